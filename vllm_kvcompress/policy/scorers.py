"""Scores that need no queries: keys only, positions only, chance."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_kvcompress.policy.interfaces import Scorer
from vllm_kvcompress.policy.observation import Observation
from vllm_kvcompress.policy.registry import register_scorer


@register_scorer("keydiff")
@dataclass(frozen=True)
class KeyDiffScorer(Scorer):
    """Keep the keys that differ: `-cos(k, mean of the normalised keys)` (arXiv 2504.15364)."""

    needs_queries: ClassVar[bool] = False
    needs_values: ClassVar[bool] = False

    def score(self, obs: Observation, layer: int) -> Tensor:
        scores = torch.empty(obs.keys.shape[:2], device=obs.keys.device)
        for head in range(obs.heads):  # all heads' keys in f32 would be gigabytes
            scores[head] = self._of_head(
                obs.keys[head], None if obs.valid is None else obs.valid[head]
            )
        return scores

    @staticmethod
    def _of_head(keys: Tensor, valid: Tensor | None) -> Tensor:
        """f32 `[n]` of keys `[n, D]`."""
        keys = F.normalize(keys.float(), dim=-1)
        if valid is not None:
            keys.masked_fill_(~valid.unsqueeze(-1), 0.0)
        return -(keys @ F.normalize(keys.sum(dim=0), dim=-1))


@register_scorer("position")
@dataclass(frozen=True)
class PositionScorer(Scorer):
    """The later, the better; with sinks protected this is StreamingLLM (arXiv 2309.17453).

    Positions stay as they are; StreamingLLM's renumbering inside the cache is not done.
    """

    needs_queries: ClassVar[bool] = False
    needs_keys: ClassVar[bool] = False
    needs_values: ClassVar[bool] = False

    def score(self, obs: Observation, layer: int) -> Tensor:
        return obs.head_positions().float()


@register_scorer("random")
@dataclass(frozen=True)
class RandomScorer(Scorer):
    """Chance, the control: a hash of (seed, layer, head, position), uniform in [0, 1)."""

    needs_queries: ClassVar[bool] = False
    needs_keys: ClassVar[bool] = False
    needs_values: ClassVar[bool] = False

    seed: int = 0

    def score(self, obs: Observation, layer: int) -> Tensor:
        head = torch.arange(obs.heads, device=obs.positions.device).unsqueeze(-1)
        stream = _mix(_mix(head + 1) + _mix(torch.full_like(head, layer + 1)))
        bits = _mix(obs.head_positions() + _mix(stream + (self.seed & 0xFFFFFFFF)))
        return (bits >> 8).float() / 2**24


def _mix(x: Tensor) -> Tensor:
    """Spread int64 values over 32 bits (the finaliser of MurmurHash3)."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)
