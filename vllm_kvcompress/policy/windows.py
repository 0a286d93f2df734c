"""Scores of whole windows of tokens, shared by all heads: WindowKV (arXiv 2503.17922)."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from vllm_kvcompress.policy.attention import AttentionScorer
from vllm_kvcompress.policy.interfaces import Scorer
from vllm_kvcompress.policy.observation import Observation
from vllm_kvcompress.policy.registry import register_scorer


@register_scorer("windows")
@dataclass(frozen=True)
class WindowScorer(Scorer):
    """One score per review window, the same for its tokens and for every head.

    The review is what stands before the observation window (the suffix); it is cut into windows
    of `review_tokens` candidates, the last of which may be short. A token's attention is joined
    over the suffix's queries; a window is worth, averaged over all query heads,

    worth: "mean", its tokens' mean (WindowKV for aggregation tasks), or "top-half", the mean of
        its `review_tokens // 2` largest (WindowKV for localization tasks).
    queries, half_life_tokens: as `AttentionScorer` joins queries; WindowKV sums them all alike.
    pool_tokens: what a token is worth, the `pool_tokens - 1` after it are worth too, so that what
        goes on in the next window stays with it; 1, as in WindowKV: windows end where they end.
    """

    needs_values: ClassVar[bool] = False
    shared_by_heads: ClassVar[bool] = True

    review_tokens: Annotated[int, Field(ge=2, le=1024)] = 8
    worth: Literal["mean", "top-half"] = "mean"
    queries: Literal["sum", "max"] = "sum"
    half_life_tokens: Annotated[float, Field(gt=0)] | None = None
    pool_tokens: Annotated[int, Field(ge=1, le=1024)] = 1

    def score(self, obs: Observation, layer: int) -> Tensor:
        attention = self.attention()
        mass = attention.pooled(attention.mass(obs)).flatten(0, 1)
        return self.token_worth(mass, obs).expand(obs.heads, obs.tokens)

    def attention(self) -> AttentionScorer:
        """Whose pooled mass, for each query head alone, is what windows are made of."""
        return AttentionScorer(
            power=1,
            queries=self.queries,
            half_life_tokens=self.half_life_tokens,
            pool_side="later",
            pool_tokens=self.pool_tokens,
            score_window=False,
        )

    def token_worth(self, mass: Tensor, obs: Observation) -> Tensor:
        """Worth of each token's window, f32 `[n]`, of the pooled mass `[Hq, n]`."""
        in_review = obs.positions < obs.query_positions.min()
        worth = self.window_worth(mass * in_review, in_review.sum())
        return worth.repeat_interleave(self.review_tokens)[: obs.tokens] * in_review

    def window_worth(self, mass: Tensor, review: Tensor | int) -> Tensor:
        """Worth of each window: attention f32 `[Hq, n]` to f32 `[ceil(n / review_tokens)]`.

        review: how many tokens, from the first on, are of the review; the others have no mass.
        """
        size = self.review_tokens
        windows = F.pad(mass, (0, -mass.shape[-1] % size)).view(len(mass), -1, size)
        counted = size
        if self.worth == "top-half":
            counted = size // 2
            windows = windows.topk(counted).values
        start = torch.arange(0, mass.shape[-1], size, device=mass.device)
        held = (review - start).clamp(1, counted)  # of the last window, which may be short
        return (windows.sum(dim=-1) / counted * (counted / held)).mean(dim=0)
