"""The judge where the pages are a CPU's: attention is scored by the kernel for it."""

from typing import Any

from torch import Tensor

from vllm_kvcompress.engine.candidates import Candidates
from vllm_kvcompress.engine.cpu_kernels import CPUKernels
from vllm_kvcompress.engine.judge import Judge
from vllm_kvcompress.engine.windows import QueryWindow
from vllm_kvcompress.policy.attention import AttentionScorer
from vllm_kvcompress.policy.interfaces import Propagator, Scorer
from vllm_kvcompress.policy.policy import Policy
from vllm_kvcompress.policy.propagators import AttentionPropagator


class CPUJudge(Judge):
    """Scores windows by the kernel where the scorer, or the propagator, is `attention`."""

    def __init__(self, *args: Any, kernels: CPUKernels) -> None:
        super().__init__(*args)
        self._kernels = kernels

    def scores(self, policy: Policy, candidates: Candidates, window: QueryWindow | None) -> Tensor:
        scorer, alike = policy.scorer, type(candidates) is Candidates and policy.group_layers == 1
        if not alike or type(scorer) is not AttentionScorer or window is None:
            return super().scores(policy, candidates, window)
        return self._score(scorer, candidates, window.layers(self._pool.num_heads), window)

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
        queries = window.layer(layer, self._pool.num_heads)
        return self._score(scorer, candidates.as_one_layer(), queries[None], window)[0]

    def _score(
        self, scorer: AttentionScorer, candidates: Candidates, queries: Tensor, window: QueryWindow
    ) -> Tensor:
        return self._kernels.score(
            scorer,
            queries,
            window.positions(),
            candidates.pages,
            candidates.valid,
            candidates.positions,
            self._scale,
        )
