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
from vllm_kvcompress.policy.windows import WindowScorer


class DeviceJudge(Judge):
    """Scores by the kernel what scorers and propagators of this package make of attention."""

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
        heads = self._pool.num_heads
        if window is not None and type(scorer) is AttentionScorer:
            queries = window.layer(layer, heads)
            return self._attention(scorer, candidates, candidates.pages, queries, window)
        if window is not None and type(scorer) is WindowScorer:
            queries = window.layer(layer, heads)
            alone = queries.flatten(1, 2).unsqueeze(2)  # each query head a KV head of its own
            pages = candidates.pages.repeat_interleave(queries.shape[2], dim=0)
            mass = self._attention(scorer.attention(), candidates, pages, alone, window)
            obs = self._observe(candidates, layer, window, keys=False, values=False)
            return scorer.token_worth(mass, obs).expand(heads, -1)
        return super()._score_layer(scorer, candidates, layer, window)

    def _attention(
        self,
        scorer: AttentionScorer,
        candidates: Candidates,
        pages: Tensor,
        queries: Tensor,
        window: QueryWindow,
    ) -> Tensor:
        """f32 `[H, n]` from queries `[w, H, G, D]` and the candidates in `pages [H, P]`."""
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
