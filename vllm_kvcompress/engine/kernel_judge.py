"""A judge that has a kernel for attention's scores."""

from abc import abstractmethod

from torch import Tensor

from vllm_kvcompress.engine.candidates import Candidates
from vllm_kvcompress.engine.judge import Judge
from vllm_kvcompress.engine.windows import QueryWindow
from vllm_kvcompress.policy.attention import AttentionScorer
from vllm_kvcompress.policy.interfaces import Propagator, Scorer
from vllm_kvcompress.policy.propagators import AttentionPropagator
from vllm_kvcompress.policy.windows import WindowScorer


class KernelJudge(Judge):
    """Scores by the kernel what scorers and propagators of this package make of attention."""

    @abstractmethod
    def _attention(
        self,
        scorer: AttentionScorer,
        candidates: Candidates,
        pages: Tensor,
        queries: Tensor,
        window: QueryWindow,
    ) -> Tensor:
        """f32 `[H, n]` from queries `[w, H, G, D]` and the candidates in `pages [H, P]`."""

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
