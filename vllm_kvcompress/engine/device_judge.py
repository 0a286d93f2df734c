"""The judge where the pages are on a GPU: attention is scored by the kernel for it."""

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from vllm_kvcompress.engine.candidates import Candidates
from vllm_kvcompress.engine.judge import Judge
from vllm_kvcompress.engine.windows import QueryWindow
from vllm_kvcompress.kernels import WindowScore, score_window, split_pages
from vllm_kvcompress.policy.attention import AttentionScorer
from vllm_kvcompress.policy.interfaces import Propagator, Scorer
from vllm_kvcompress.policy.propagators import AttentionPropagator


class DeviceJudge(Judge):
    """Scores windows by the kernel where the scorer, or the propagator, is `attention`."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._keys, _ = split_pages(self._pool.cache)

    def _own_saliency(
        self, propagator: Propagator, candidates: Candidates, layer: int, window: QueryWindow
    ) -> Tensor:
        if type(propagator) is not AttentionPropagator:
            return super()._own_saliency(propagator, candidates, layer, window)
        return self._score_layer(propagator.scorer(), candidates, layer, window).sum(dim=0)

    def _score_layer(
        self, scorer: Scorer, candidates: Candidates, layer: int, window: QueryWindow | None
    ) -> Tensor:
        if type(scorer) is not AttentionScorer or window is None:
            return super()._score_layer(scorer, candidates, layer, window)
        heads, tokens = self._pool.num_heads, candidates.tokens
        if candidates.valid is None:
            lengths = torch.full((heads,), tokens, dtype=torch.int32, device=self._pool.device)
        else:
            lengths = candidates.valid.sum(dim=-1, dtype=torch.int32)
        return score_window(
            window.layer(layer, heads),
            window.positions(),
            self._keys,
            candidates.pages.contiguous(),
            lengths,
            candidates.positions.contiguous(),
            self._scale,
            WindowScore(**{rule.name: getattr(scorer, rule.name) for rule in fields(WindowScore)}),
        )
