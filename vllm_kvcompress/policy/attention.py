"""Scores from the attention that the last queries pay: KV-Compress, SnapKV and kin."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from vllm_kvcompress.policy.interfaces import Scorer
from vllm_kvcompress.policy.observation import Observation
from vllm_kvcompress.policy.registry import register_scorer

# Heads are taken together as long as their attention matrix stays below 256 MB.
MAX_LOGITS = 1 << 26


@register_scorer("attention")
@dataclass(frozen=True)
class AttentionScorer(Scorer):
    """Attention that each key receives from the window's queries, pooled, then over the group.

    `score[h, j] = GROUP_g POOL_j QUERIES_i A[g, i, j] ** power`, with A the softmax over all keys
    that query i may see. KV-Compress (arXiv 2410.00161, section 3): power 2, max-pool, both sums.
    SnapKV (arXiv 2404.14469): power 1, avg-pool, mean over the group, `score_window` False.

    power: 1 or 2 ("L1", "L2"); 2 favours keys that few queries attend to strongly.
    queries: how the window's queries become one: "sum", or "max": what one of them needs is
        needed, however many others look elsewhere.
    half_life_tokens: by how many tokens a query must be older to count half as much; None for
        all alike. The prompt's very end knows best what will be asked for.
    pool, pool_tokens: stride-1 pooling over the keys of each query head. It keeps the
        neighbours of what was attended to: the value behind a key, the rest of a span.
    pool_side: "both" sides, or only the "later" tokens, the continuation.
    group: how the query heads of a KV head become one.
    exclude_tokens: pairs closer than that do not count.
    score_window: whether the keys of the window itself count and enter the pooling.
    """

    needs_values: ClassVar[bool] = False

    power: Literal[1, 2] = 2
    queries: Literal["sum", "max"] = "sum"
    half_life_tokens: Annotated[float, Field(gt=0)] | None = None
    pool: Literal["max", "avg", "none"] = "max"
    pool_tokens: Annotated[int, Field(ge=1, le=1024)] = 7
    pool_side: Literal["both", "later"] = "both"
    group: Literal["sum", "mean", "max"] = "sum"
    exclude_tokens: Annotated[int, Field(ge=0)] = 0
    score_window: bool = True

    def __post_init__(self) -> None:
        if self.pool != "none" and self.pool_side == "both" and self.pool_tokens % 2 == 0:
            raise ValueError(
                f"pool_tokens={self.pool_tokens} must be odd where pool_side is 'both'"
            )

    @property
    def reach(self) -> tuple[int, int]:
        """Keys before and after one that enter its pool."""
        if self.pool == "none":
            return 0, 0
        before = self.pool_tokens - 1 if self.pool_side == "later" else self.pool_tokens // 2
        return before, self.pool_tokens - 1 - before

    def fade(self, query_positions: Tensor) -> Tensor:
        """What each query counts, f32 `[w]`."""
        age = (query_positions[-1] - query_positions).float()
        return 0.5 ** (age / (self.half_life_tokens or torch.inf))

    def score(self, obs: Observation, layer: int) -> Tensor:
        return self.reduce(self.mass(obs))

    def mass(self, obs: Observation) -> Tensor:
        """`QUERIES_i A[g, i, j] ** power`, f32 `[H, G, n]`."""
        window, heads, group, _ = obs.queries.shape
        queries = (obs.queries.float() * obs.scale).permute(1, 2, 0, 3)  # [H, G, w, D]
        at_once = max(1, MAX_LOGITS // (group * window * obs.tokens))
        parts = [
            self._mass_of_heads(obs, queries, slice(h, h + at_once))
            for h in range(0, heads, at_once)
        ]
        mass = parts[0] if len(parts) == 1 else torch.cat(parts)
        if not self.score_window:
            mass.masked_fill_((obs.positions >= obs.query_positions.min()).unsqueeze(-2), 0.0)
        return mass

    def reduce(self, mass: Tensor) -> Tensor:
        """Pool the keys of each query head, then join the group: `[H, G, n]` to `[H, n]`."""
        pooled = self.pooled(mass)
        if self.group == "max":
            return pooled.amax(dim=1)
        return pooled.sum(dim=1) if self.group == "sum" else pooled.mean(dim=1)

    def _mass_of_heads(self, obs: Observation, queries: Tensor, heads: slice) -> Tensor:
        keys = obs.keys[heads].float()
        logits = torch.bmm(queries[heads].flatten(1, 2), keys.transpose(1, 2))
        logits = logits.view(*queries[heads].shape[:3], obs.tokens)  # [H, G, w, n]
        positions = obs.positions if obs.positions.dim() == 1 else obs.positions[heads]
        _hide_future(logits, positions, obs.query_positions, padded=obs.valid is not None)
        if obs.valid is not None:
            logits.masked_fill_(~obs.valid[heads, None, None], -torch.inf)
        attention = torch.softmax(logits, dim=-1, out=logits)
        if self.exclude_tokens:
            distance = obs.query_positions[:, None] - positions[..., None, :]
            attention.masked_fill_((distance < self.exclude_tokens).unsqueeze(-3), 0.0)
        if self.half_life_tokens is not None:
            attention *= self.fade(obs.query_positions)[:, None]
        if self.queries == "max":
            return attention.amax(dim=2) ** self.power
        return (attention.square_() if self.power == 2 else attention).sum(dim=2)

    def pooled(self, mass: Tensor) -> Tensor:
        """Every key's mass joined with that of its neighbours, `[..., n]`."""
        if self.pool == "none" or self.pool_tokens == 1:
            return mass
        padded = F.pad(mass, self.reach)  # mass >= 0: 0 is neutral
        pool = F.max_pool1d if self.pool == "max" else F.avg_pool1d
        return pool(padded, self.pool_tokens, stride=1)


def _hide_future(logits: Tensor, positions: Tensor, query_positions: Tensor, padded: bool) -> None:
    """Put `-inf` where a key comes after the query; logits `[H, G, w, n]`, in place.

    Positions ascend and the queries are the newest, so where all heads share their positions
    and no padding stands last, only the last w keys can come after a query.
    """
    shared = positions.dim() == 1 and not padded
    start = max(0, logits.shape[-1] - len(query_positions)) if shared else 0
    future = positions[..., None, start:] > query_positions[:, None]  # [w, w] or [H, w, n]
    logits[..., start:].masked_fill_(future.unsqueeze(-3), -torch.inf)
