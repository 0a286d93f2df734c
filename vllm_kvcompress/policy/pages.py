"""What pages are worth, and how whole pages are dealt out."""

import torch
from torch import Tensor

from vllm_kvcompress.policy.ranking import ascending, largest


def page_prices(scores: Tensor, page_tokens: int) -> Tensor:
    """The worth of each head's 1st, 2nd, ... page if it is filled in rank order.

    A head with p pages keeps its `p * B` best tokens, so its p-th page is worth the sum of the
    scores of ranks `(p-1)*B .. p*B-1` (KV-Compress, arXiv 2410.00161, without the rule for
    partly filled pages, which this design does not have). Protected tokens (`+inf`) are kept in
    every head anyway and count nothing.

    Args:
        scores: f32 `[..., n]`.

    Returns:
        f32 `[..., n // B]`.
    """
    pages = scores.shape[-1] // page_tokens
    ranked = ascending(scores).nan_to_num_(posinf=0.0, neginf=0.0)
    whole = ranked[..., scores.shape[-1] - pages * page_tokens :]
    return whole.view(*whole.shape[:-1], pages, page_tokens).sum(dim=-1).flip(-1)


def deal_best_pages(prices: Tensor, totals: Tensor, least: Tensor, most: Tensor) -> Tensor:
    """Give each head its `least` pages and the rest of a row's total to the best pages left.

    Args:
        prices: f32 `[R, M, P]`, the pages of M heads that compete inside each of R rows.
        totals: int64 `[R]`, between the row sums of `least` and `most`.
        least, most: int64 `[R, M]`.

    Returns:
        int64 `[R, M]` with row sums `totals`; equal prices go to the lower head.
    """
    page = torch.arange(prices.shape[-1], device=prices.device)
    competing = (page >= least.unsqueeze(-1)) & (page < most.unsqueeze(-1))
    offers = prices.masked_fill(~competing, -torch.inf)
    won = largest(offers.flatten(1), totals - least.sum(dim=-1))
    return least + won.view_as(offers).sum(dim=-1)


def apportion(shares: Tensor, total: int, least: Tensor, most: Tensor) -> Tensor:
    """Split `total` in proportion to `shares`, in whole numbers from `least` to `most`.

    What a bound takes away or adds is shared by the others in proportion. The remainder goes
    to the largest fractions, ties to the lower index.

    Args:
        shares: f64 `[M]`, >= 0.
        total: between the sums of `least` and `most`.
        least, most: int64 `[M]`.

    Returns:
        int64 `[M]`, summing to `total`.
    """
    quotas = _bounded_quotas(shares.double().clamp(min=1e-9), total, least, most)
    parts = torch.minimum((quotas + 1e-9).floor().long(), most)
    fractions = ((quotas - parts) * 1e6).round()
    while (left := total - int(parts.sum())) > 0:
        open_fractions = fractions.masked_fill(parts >= most, -torch.inf)
        winners = open_fractions.argsort(descending=True, stable=True)
        winners = winners[: min(left, int((parts < most).sum()))]
        parts[winners] += 1
    return parts


def _bounded_quotas(shares: Tensor, total: int, least: Tensor, most: Tensor) -> Tensor:
    """Real numbers in proportion to `shares` except where a bound holds; they sum to `total`."""
    quotas = torch.zeros_like(shares)
    free = torch.ones_like(shares, dtype=torch.bool)
    while bool(free.any()):
        scale = (total - quotas[~free].sum()) / shares[free].sum()
        quotas = torch.where(free, shares * scale, quotas)
        too_low = free & (quotas < least)
        too_high = free & (quotas > most)
        missing = (least - quotas)[too_low].sum()
        excess = (quotas - most)[too_high].sum()
        if missing == 0 and excess == 0:
            return quotas
        # The graver violations are certain to end at their bound; the others may yet mend.
        fixed, bounds = (too_low, least) if missing >= excess else (too_high, most)
        quotas = torch.where(fixed, bounds.double(), quotas)
        free = free & ~fixed
    return quotas
