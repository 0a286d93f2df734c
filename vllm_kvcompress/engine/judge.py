"""What the tokens of a request are worth to its policy, layer by layer, from the pages."""

from collections.abc import Callable

import torch
from torch import Tensor

from vllm_kvcompress.accounting import Settings
from vllm_kvcompress.config import EngineConfig
from vllm_kvcompress.engine.candidates import Candidates
from vllm_kvcompress.engine.windows import QueryWindow
from vllm_kvcompress.paging.pool import PagePool
from vllm_kvcompress.policy.interfaces import Propagator, Scorer
from vllm_kvcompress.policy.observation import Observation
from vllm_kvcompress.policy.policy import Policy
from vllm_kvcompress.policy.registry import build


class Judge:
    """The policies of one worker, asked about requests.

    Args:
        pool: the worker's pages.
        scale: the model's softmax scale.
        mean_over_ranks: averages a tensor over the tensor-parallel ranks.
    """

    def __init__(
        self,
        config: EngineConfig,
        pool: PagePool,
        scale: float,
        mean_over_ranks: Callable[[Tensor], Tensor] = lambda own: own,
    ) -> None:
        self._config = config
        self._pool = pool
        self._scale = scale
        self._mean_over_ranks = mean_over_ranks
        self._policies: dict[tuple[str, str | None], Policy] = {}

    def policy(self, settings: Settings) -> Policy:
        key = settings.preset, settings.task
        policy = self._policies.get(key)
        if policy is None:
            preset = self._config.known_presets()[settings.preset].for_task(settings.task)
            policy = build(preset, self._pool.num_layers)
            self._policies[key] = policy
        return policy

    def scores(self, policy: Policy, candidates: Candidates, window: QueryWindow | None) -> Tensor:
        """f32 `[L, H, n]` of all candidates."""
        pool, scorer = self._pool, policy.scorer
        shape = (pool.num_layers, pool.num_heads, candidates.tokens)
        scores = torch.zeros(shape, device=pool.device)
        leaders_first = sorted(range(pool.num_layers), key=lambda l: policy.leader(l) != l)
        for layer in leaders_first:
            if (leader := policy.leader(layer)) != layer:
                scores[layer] = candidates.passed_on(scores[leader], leader, layer)
                continue
            own = candidates.of_layer(layer)
            found = self._score_layer(scorer, own, layer, window)[:, : candidates.tokens]
            scores[layer, :, : found.shape[-1]] = found
        if scorer.shared_by_heads:
            scores[:] = self._mean_over_ranks(scores[:, :1].contiguous())
        return scores

    def saliency(
        self, propagator: Propagator, candidates: Candidates, layer: int, window: QueryWindow
    ) -> Tensor:
        """f32 `[n]` of one layer's candidates, the same on all ranks."""
        return self._mean_over_ranks(self._own_saliency(propagator, candidates, layer, window))

    def _own_saliency(
        self, propagator: Propagator, candidates: Candidates, layer: int, window: QueryWindow
    ) -> Tensor:
        """f32 `[n]` by this rank's heads."""
        obs = self._observe(candidates, layer, window, keys=True, values=propagator.needs_values)
        return propagator.saliency(obs, layer)

    def _score_layer(
        self, scorer: Scorer, candidates: Candidates, layer: int, window: QueryWindow | None
    ) -> Tensor:
        """f32 `[H, n]` of one layer's candidates."""
        obs = self._observe(candidates, layer, window, scorer.needs_keys, scorer.needs_values)
        return scorer.score(obs, layer)

    def _observe(
        self,
        candidates: Candidates,
        layer: int,
        window: QueryWindow | None,
        keys: bool,
        values: bool,
    ) -> Observation:
        """One layer of a request as scorers see it; what they do not need is left empty."""
        pool = self._pool
        heads, tokens = pool.num_heads, candidates.tokens
        nothing = torch.empty(heads, tokens, 0, device=pool.device)
        none_asked = torch.empty(0, heads, 1, pool.head_size, device=pool.device)
        return Observation(
            queries=window.layer(layer, heads) if window else none_asked,
            query_positions=window.positions() if window else torch.empty(0, device=pool.device),
            keys=pool.keys(candidates.pages)[:, :tokens] if keys else nothing,
            values=pool.values(candidates.pages)[:, :tokens] if values else nothing,
            positions=candidates.positions,
            valid=candidates.valid,
            scale=self._scale,
        )
