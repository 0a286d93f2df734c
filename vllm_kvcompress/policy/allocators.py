"""Who gets how many pages."""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from vllm_kvcompress.policy.interfaces import Allocator
from vllm_kvcompress.policy.pages import apportion, deal_best_pages, page_prices
from vllm_kvcompress.policy.ranking import MarkedScores
from vllm_kvcompress.policy.registry import register_allocator


@register_allocator("uniform")
@dataclass(frozen=True)
class UniformAllocator(Allocator):
    """Every head of every layer the same."""

    def allocate(
        self,
        scores: MarkedScores,
        total_pages: int,
        page_tokens: int,
        min_pages: int,
        max_pages: Tensor,
    ) -> Tensor:
        shares = torch.ones(len(max_pages), device=max_pages.device)
        return _in_proportion(shares, total_pages, min_pages, max_pages)


@register_allocator("pyramid")
@dataclass(frozen=True)
class PyramidAllocator(Allocator):
    """Linearly fewer pages from the first layer to the last (PyramidKV, arXiv 2406.02069).

    With `b` tokens per head on average the last layer gets `b / beta` and the first `2b` less
    that, as kvpress has it. Where the last layer would get less than `uniform_below_tokens`,
    all layers get the same.
    """

    beta: Annotated[float, Field(ge=1)] = 20.0
    uniform_below_tokens: Annotated[int, Field(ge=0)] = 64

    def allocate(
        self,
        scores: MarkedScores,
        total_pages: int,
        page_tokens: int,
        min_pages: int,
        max_pages: Tensor,
    ) -> Tensor:
        layers, heads, n = scores.values.shape
        mean_tokens = total_pages * page_tokens / (layers * heads)
        shares = self.layer_tokens(layers, mean_tokens, n, max_pages.device)
        return _in_proportion(shares, total_pages, min_pages, max_pages)

    def layer_tokens(
        self, layers: int, mean_tokens: float, n: int, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Tokens per head of each layer before rounding to pages, f64 `[L]`."""
        last = mean_tokens / self.beta
        first = 2 * mean_tokens - last
        if first > n:
            first = float(n - self.uniform_below_tokens)
            last = 2 * mean_tokens - first
        if not n >= first >= last >= self.uniform_below_tokens:
            first = last = mean_tokens
        return torch.linspace(first, last, layers, dtype=torch.float64, device=device)


@register_allocator("group-pyramid")
@dataclass(frozen=True)
class GroupPyramidAllocator(Allocator):
    """Fewer pages from one group of layers to the next (WindowKV, arXiv 2503.17922).

    All heads of all layers of a group get the same. With `b` tokens per head on average the last
    group gets `b * floor_layers / beta` and the first `2b` less that.

    group_layers: consecutive layers per group; it must divide the model's layers. Given by the
        preset's own `group_layers` where left out.
    floor_layers: the group's size as in WindowKV's released code (None), a pyramid of 2.5 : 1
        for groups of 8; 1 as in the paper's formula, which is some 8 times steeper.
    """

    group_layers: Annotated[int, Field(ge=1)] = 1
    beta: Annotated[int, Field(ge=1)] = 14
    floor_layers: Annotated[int, Field(ge=1)] | None = None

    def allocate(
        self,
        scores: MarkedScores,
        total_pages: int,
        page_tokens: int,
        min_pages: int,
        max_pages: Tensor,
    ) -> Tensor:
        layers, heads = max_pages.shape
        groups = layers // self.group_layers
        lanes = layers * heads
        if layers % self.group_layers or total_pages % (self.group_layers * heads):
            raise ValueError(
                f"groups of {self.group_layers} layers cannot share {total_pages} pages of "
                f"{layers} layers and {heads} heads evenly"
            )
        most = max_pages.view(groups, -1).amin(dim=-1)
        per_head = apportion(
            self.group_tokens(total_pages * page_tokens // lanes, groups, max_pages.device),
            total_pages * groups // lanes,
            torch.full_like(most, min_pages),
            most,
        )
        return per_head.repeat_interleave(self.group_layers * heads).view_as(max_pages)

    def group_tokens(
        self, mean_tokens: int, groups: int, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Tokens per head of each group before rounding to pages, as the released code has them.

        int64 `[groups]`.
        """
        last = mean_tokens * (self.floor_layers or self.group_layers) // self.beta
        last = min(last, mean_tokens)
        first = 2 * mean_tokens - last
        step = (first - last) // max(1, groups - 1)
        tokens = first - step * torch.arange(groups, device=device)
        tokens[-1:] = last if groups > 1 else mean_tokens
        return tokens


@register_allocator("adaptive")
@dataclass(frozen=True)
class AdaptiveAllocator(Allocator):
    """Every layer the same; inside a layer the heads compete (AdaKV, arXiv 2407.11550).

    Each head is sure of the fraction `alpha` of its equal share, in whole pages.
    """

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.2

    def allocate(
        self,
        scores: MarkedScores,
        total_pages: int,
        page_tokens: int,
        min_pages: int,
        max_pages: Tensor,
    ) -> Tensor:
        layers, heads = max_pages.shape
        most = max_pages.sum(dim=-1)
        shares = torch.ones(layers, device=most.device)
        totals = apportion(shares, total_pages, torch.full_like(most, heads * min_pages), most)
        sure = (totals * self.alpha / heads).floor().long().clamp(min=min_pages).unsqueeze(-1)
        least = torch.minimum(sure.expand(layers, heads), max_pages)
        return deal_best_pages(page_prices(scores.ascending, page_tokens), totals, least, max_pages)


@register_allocator("global")
@dataclass(frozen=True)
class GlobalAllocator(Allocator):
    """All heads of all layers compete, page by page (KV-Compress, arXiv 2410.00161).

    The `total_pages` dearest pages win, wherever they are. Protected tokens sit in the first
    `min_pages` pages of every head, which no head can lose, so only the pages after those
    compete and no head profits from what it must keep anyway.
    """

    def allocate(
        self,
        scores: MarkedScores,
        total_pages: int,
        page_tokens: int,
        min_pages: int,
        max_pages: Tensor,
    ) -> Tensor:
        prices = page_prices(scores.ascending, page_tokens)
        most = max_pages.view(1, -1)
        totals = torch.full((1,), total_pages, device=most.device)
        least = torch.full_like(most, min_pages)
        rivals = prices.flatten(0, 1).unsqueeze(0)  # [1, L*H, P]
        return deal_best_pages(rivals, totals, least, most).view_as(max_pages)


def _in_proportion(
    layer_shares: Tensor, total_pages: int, min_pages: int, max_pages: Tensor
) -> Tensor:
    """Pages in proportion to `layer_shares` `[L]`, the same for all heads of a layer."""
    shares = layer_shares.unsqueeze(-1).expand(max_pages.shape).flatten()
    most = max_pages.flatten()
    return apportion(shares, total_pages, torch.full_like(most, min_pages), most).view_as(max_pages)
