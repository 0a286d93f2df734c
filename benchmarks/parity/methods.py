"""Which tokens FastKV and WindowKV keep, from their papers' formulas and nothing of `policy/`.

n prompt tokens, B tokens per page, L layers, Hq query and H KV heads. Tokens of the last, partly
filled page are always kept; what is kept of the others fills whole pages.
"""

from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_kvcompress.presets import Preset


class Method(Protocol):
    tsp_layer: int | None  # the last layer that sees all tokens; None: all do
    window_tokens: int

    def propagated(self, paid: Tensor) -> Tensor:
        """Positions that go on above `tsp_layer`; `paid` as in `kept`, over all tokens."""
        ...

    def kept(self, paid: list[Tensor], seen: list[Tensor], n: int) -> Tensor:
        """bool `[L, H, n]`.

        Args:
            paid: of each layer, what the window's queries pay to the tokens it has seen,
                f32 `[H, G, w, m]`, every query's adding up to 1.
            seen: those tokens' positions, int64 `[m]`.
        """
        ...


@dataclass(frozen=True)
class FastKV:
    """arXiv 2502.01068: the sum over the window, max-pool, the sum over a group or over all."""

    window_tokens: int
    pool_tokens: int
    tsp_rate: float
    tsp_layer: int
    budget_tokens: int
    block_tokens: int

    @staticmethod
    def of(preset: Preset, layers: int, budget_tokens: int, block_tokens: int) -> "FastKV":
        return FastKV(
            preset.window_tokens,
            preset.scorer.params["pool_tokens"],
            preset.tsp_rate or 1.0,
            layers // 2 - 1 if preset.tsp_layer is None else preset.tsp_layer,
            budget_tokens,
            block_tokens,
        )

    def propagated(self, paid: Tensor) -> Tensor:
        n = paid.shape[-1]
        tail = n % self.block_tokens
        wanted = max(int(n * self.tsp_rate), self.window_tokens) - tail
        count = max(1, ceil(wanted / self.block_tokens)) * self.block_tokens + tail
        last = max(self.window_tokens, tail)
        best = _best(self._pooled(paid).sum(dim=(0, 1))[: n - last], count - last)
        return torch.cat([best, torch.arange(n - last, n)])

    def kept(self, paid: list[Tensor], seen: list[Tensor], n: int) -> Tensor:
        tail = n % self.block_tokens
        pages = _pages(self.budget_tokens, n, self.block_tokens)
        pages = min(pages, *(len(positions) // self.block_tokens for positions in seen))
        recent = max(0, self.window_tokens - tail)
        out = torch.zeros(len(paid), paid[0].shape[0], n, dtype=torch.bool)
        for layer, positions in enumerate(seen):
            scores = self._pooled(paid[layer]).sum(dim=1)  # [H, m]
            old = len(positions) - tail - recent
            for head, own in enumerate(scores):
                best = _best(own[:old], pages * self.block_tokens - recent)
                out[layer, head, positions[best]] = True
        out[..., n - tail - recent :] = True
        return out

    def _pooled(self, paid: Tensor) -> Tensor:
        before = paid.sum(dim=2)[..., : paid.shape[-1] - self.window_tokens]  # [H, G, m - w]
        half = self.pool_tokens // 2
        pooled = F.max_pool1d(before, self.pool_tokens, stride=1, padding=half)
        return F.pad(pooled, (0, self.window_tokens))


@dataclass(frozen=True)
class WindowKV:
    """arXiv 2503.17922: windows of tokens judged by the first layer of each group, for all heads.

    half_life_tokens, queries, pool_tokens: of the tuned preset; None, "sum", 1 as published.
    """

    window_tokens: int
    recent_tokens: int
    review_tokens: int
    top_half: bool
    queries: str
    half_life_tokens: float | None
    pool_tokens: int
    group_layers: int
    last_share: Fraction
    budget_tokens: int
    block_tokens: int
    tsp_layer: None = None

    @staticmethod
    def of(preset: Preset, layers: int, budget_tokens: int, block_tokens: int) -> "WindowKV":
        scorer, group = preset.scorer.params, max(1, layers // 4)
        floor = preset.allocator.params.get("floor_layers", group)
        return WindowKV(
            preset.window_tokens,
            preset.recent_tokens,
            scorer["review_tokens"],
            scorer["worth"] == "top-half",
            scorer.get("queries", "sum"),
            scorer.get("half_life_tokens"),
            scorer.get("pool_tokens", 1),
            group,
            Fraction(floor, preset.allocator.params["beta"]),
            budget_tokens,
            block_tokens,
        )

    def propagated(self, paid: Tensor) -> Tensor:
        return torch.arange(paid.shape[-1])

    def kept(self, paid: list[Tensor], seen: list[Tensor], n: int) -> Tensor:
        layers, tail = len(paid), n % self.block_tokens
        mean = _pages(self.budget_tokens, n, self.block_tokens)
        recent = max(0, self.recent_tokens - tail)
        least = max(1, ceil(recent / self.block_tokens))
        groups = layers // self.group_layers
        pages = _dealt(self._pyramid(mean, groups), mean * groups, least)
        out = torch.zeros(layers, paid[0].shape[0], n, dtype=torch.bool)
        for layer in range(layers):
            group = layer // self.group_layers
            worth = self._worth(paid[group * self.group_layers], n)
            best = _best(worth[: n - tail - recent], pages[group] * self.block_tokens - recent)
            out[layer][:, best] = True
        out[..., n - tail - recent :] = True
        return out

    def _worth(self, paid: Tensor, n: int) -> Tensor:
        """What the window of each token is worth, `[n]`; 0 in the suffix."""
        paid = paid.flatten(0, 1)  # [Hq, w, n]
        if self.half_life_tokens is not None:
            age = torch.arange(paid.shape[1] - 1, -1, -1)
            paid = paid * (0.5 ** (age / self.half_life_tokens))[:, None]
        each = paid.amax(dim=1) if self.queries == "max" else paid.sum(dim=1)
        review = n - self.window_tokens
        reached = torch.stack(
            [F.pad(each[:, :review], (by, 0))[:, :review] for by in range(self.pool_tokens)]
        ).amax(dim=0)
        worth = torch.zeros(n)
        for start in range(0, review, self.review_tokens):
            window = reached[:, start : min(start + self.review_tokens, review)]
            if self.top_half:
                counted = min(self.review_tokens // 2, window.shape[1])
                window = window.sort(dim=1, descending=True).values[:, :counted]
            worth[start : min(start + self.review_tokens, review)] = window.mean()
        return worth

    def _pyramid(self, mean_pages: int, groups: int) -> list[int]:
        """Tokens per head of each group, as the released code counts them."""
        mean = mean_pages * self.block_tokens
        last = min(mean, int(mean * self.last_share))
        first = 2 * mean - last
        step = (first - last) // max(1, groups - 1)
        return [*(first - i * step for i in range(groups - 1)), last]


def _best(scores: Tensor, count: int) -> Tensor:
    """Ascending indices of the `count` largest; of equals the first."""
    return scores.sort(descending=True, stable=True).indices[:count].sort().values


def _pages(budget_tokens: int, n: int, block_tokens: int) -> int:
    return max(1, ceil((budget_tokens - n % block_tokens) / block_tokens))


def _dealt(shares: list[int], total: int, least: int) -> list[int]:
    """`total` pages in proportion to `shares`, at least `least` each, by largest remainder."""
    poor: set[int] = set()
    while True:
        rich = [i for i in range(len(shares)) if i not in poor]
        scale = Fraction(total - least * len(poor), sum(shares[i] for i in rich))
        below = {i for i in rich if shares[i] * scale < least}
        if not below:
            break
        poor |= below
    quotas = [Fraction(least) if i in poor else shares[i] * scale for i in range(len(shares))]
    pages = [int(quota) for quota in quotas]
    by_fraction = sorted(range(len(shares)), key=lambda i: (pages[i] - quotas[i], i))
    for i in by_fraction[: total - sum(pages)]:
        pages[i] += 1
    return pages
