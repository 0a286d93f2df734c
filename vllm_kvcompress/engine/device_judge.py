"""The judge where the pages are on a GPU: attention is scored by the kernel for it."""

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from vllm_kvcompress.engine.candidates import Candidates
from vllm_kvcompress.engine.kernel_judge import KernelJudge
from vllm_kvcompress.engine.windows import QueryWindow
from vllm_kvcompress.kernels import WindowScore, score_window, split_pages
from vllm_kvcompress.policy.attention import AttentionScorer


class DeviceJudge(KernelJudge):
    """Scores by the kernel `score_window`."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._keys, _ = split_pages(self._pool.cache)

    def _attention(
        self,
        scorer: AttentionScorer,
        candidates: Candidates,
        pages: Tensor,
        queries: Tensor,
        window: QueryWindow,
    ) -> Tensor:
        if candidates.valid is None:
            shape, device = (len(pages),), self._pool.device
            lengths = torch.full(shape, candidates.tokens, dtype=torch.int32, device=device)
        else:
            lengths = candidates.valid.sum(dim=-1, dtype=torch.int32)
        return score_window(
            queries,
            window.positions(),
            self._keys,
            pages.contiguous(),
            lengths,
            candidates.positions.contiguous(),
            self._scale,
            WindowScore(**{rule.name: getattr(scorer, rule.name) for rule in fields(WindowScore)}),
        )
