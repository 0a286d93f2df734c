"""Which tokens of a prompt the deep layers get to see: token-selective propagation."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from vllm_kvcompress.policy.attention import AttentionScorer
from vllm_kvcompress.policy.interfaces import Propagator
from vllm_kvcompress.policy.observation import Observation
from vllm_kvcompress.policy.ranking import indices_of, largest
from vllm_kvcompress.policy.registry import register_propagator


@register_propagator("attention")
@dataclass(frozen=True)
class AttentionPropagator(Propagator):
    """Attention of the window's queries, pooled, summed over all heads (FastKV, arXiv 2502.01068).

    The keys of the window itself do not count; they are propagated anyway.
    """

    needs_values: ClassVar[bool] = False

    pool: Literal["max", "avg", "none"] = "max"
    pool_tokens: Annotated[int, Field(ge=1, le=1024)] = 7

    def __post_init__(self) -> None:
        self.scorer()

    def saliency(self, obs: Observation, layer: int) -> Tensor:
        return self.scorer().score(obs, layer).sum(dim=0)

    def scorer(self) -> AttentionScorer:
        """Whose scores, summed over the heads, are the saliency."""
        return AttentionScorer(
            power=1, pool=self.pool, pool_tokens=self.pool_tokens, score_window=False
        )


def select_positions(saliency: Tensor, tokens: int, last: int) -> Tensor:
    """The `last` positions of a prompt and, of the others, the most salient.

    Args:
        saliency: f32 `[n]`.
        tokens: how many in all, from `last` to n.

    Returns:
        int64 `[tokens]`, ascending; among equals the earlier position wins.
    """
    worth = saliency.float().nan_to_num(nan=-torch.inf).clone()
    worth[len(worth) - last :] = torch.inf
    count = torch.full((), tokens, device=worth.device)
    return indices_of(largest(worth, count), tokens)
