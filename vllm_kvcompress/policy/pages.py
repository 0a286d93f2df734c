"""What pages are worth, and how whole pages are dealt out."""

import torch
from torch import Tensor

from vllm_kvcompress.policy.ranking import largest, row_blocks


def page_prices(ranked: Tensor, page_tokens: int) -> Tensor:
    """The worth of each head's 1st, 2nd, ... page if it is filled in rank order.

    A head with p pages keeps its `p * B` best tokens, so its p-th page is worth the sum of the
    scores of ranks `(p-1)*B .. p*B-1` (KV-Compress, arXiv 2410.00161, without the rule for
    partly filled pages, which this design does not have). Protected tokens (`+inf`) are kept in
    every head anyway and count nothing.

    Args:
        ranked: f32 `[..., n]`, ascending marked scores.

    Returns:
        f32 `[..., n // B]`.
    """
    n = ranked.shape[-1]
    rows, pages = ranked.reshape(-1, n), n // page_tokens
    prices = ranked.new_empty(len(rows), pages)
    for block in row_blocks(*rows.shape):
        counted = rows[block, n - pages * page_tokens :].nan_to_num(posinf=0.0, neginf=0.0)
        prices[block] = counted.view(-1, pages, page_tokens).sum(dim=-1).flip(-1)
    return prices.view(*ranked.shape[:-1], pages)


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
    fractions = ((quotas - parts) * 1e6).round().masked_fill_(parts >= most, -torch.inf)
    return parts + largest(fractions, total - parts.sum())


def _bounded_quotas(shares: Tensor, total: int, least: Tensor, most: Tensor) -> Tensor:
    """Real numbers in proportion to `shares` except where a bound holds; they sum to `total`.

    A quota is `share * scale` clamped to its bounds, and the sum of the quotas grows with the
    scale: of the scales at which a bound begins or ceases to hold, the last before `total` and
    the first behind it say which bounds hold.
    """
    begins, ceases = least / shares, most / shares
    scales = torch.cat([begins, ceases])
    sums = torch.clamp(scales.unsqueeze(-1) * shares, least, most).sum(dim=-1)
    before = scales.masked_fill(sums > total, -torch.inf).amax()
    behind = scales.masked_fill(sums < total, torch.inf).amin()
    low, high = begins >= behind, ceases <= before
    held = torch.where(low, least, most).double().masked_fill_(~(low | high), 0.0)
    free = shares.masked_fill(low | high, 0.0)
    return held + free * ((total - held.sum()) / free.sum().clamp(min=1e-300))
