"""Exact "the k largest of each row", with k a tensor: what allocators and selectors share.

All shapes follow from numbers that the host knows, so nothing here waits for a GPU.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

# Rows are taken together up to so many elements: a GPU's sort of them all would need eleven
# times their bytes beside them.
AT_ONCE = 1 << 21


@dataclass(frozen=True)
class MarkedScores:
    """The scores of a request's candidates, with marks where the score does not matter.

    values: f32 `[L, H, n]`; `+inf` marks protected tokens, `-inf` padding, everything else is
        finite.
    """

    values: Tensor

    @cached_property
    def ascending(self) -> Tensor:
        """`values`, each head's in ascending order; sorted when first asked for."""
        return ascending(self.values)


def row_blocks(rows: int, length: int) -> Iterator[slice]:
    """`0 .. rows` in order, as many rows of `length` elements at a time as `AT_ONCE` allows."""
    step = max(1, AT_ONCE // max(1, length))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def ascending(values: Tensor) -> Tensor:
    """`values` sorted along the last dimension, without their indices.

    On a CPU by NumPy, whose vectorised sort of bare values is some 30 times faster than
    `torch.sort`, which has no way not to make indices.
    """
    if values.device.type == "cpu":
        return torch.from_numpy(np.sort(values.numpy(), axis=-1))
    rows = values.reshape(-1, values.shape[-1])
    ranked = torch.empty_like(rows, memory_format=torch.contiguous_format)
    for block in row_blocks(*rows.shape):
        ranked[block] = rows[block].sort(dim=-1).values
    return ranked.view(values.shape)


def largest(values: Tensor, counts: Tensor, ranked: Tensor | None = None) -> Tensor:
    """Mark the `counts[...]` largest of each row; among equals the lower index wins.

    Args:
        values: f32 or f64 `[..., n]` without NaN.
        counts: int64 `[...]`, each from 0 to n.
        ranked: `ascending(values)`, where it is known.

    Returns:
        bool `[..., n]` with exactly `counts` True in each row.
    """
    n = values.shape[-1]
    if ranked is None:
        ranked = ascending(values)
    last_kept = (n - counts).clamp_(max=n - 1).unsqueeze(-1)
    thresholds = ranked.gather(-1, last_kept).view(-1, 1)
    rows, wanted = values.reshape(-1, n), counts.reshape(-1, 1)
    marks = torch.empty(rows.shape, dtype=torch.bool, device=values.device)
    for block in row_blocks(*rows.shape):
        own, threshold = rows[block], thresholds[block]
        above = torch.gt(own, threshold, out=marks[block])
        equal = own == threshold
        free = wanted[block] - above.sum(dim=-1, keepdim=True)
        above |= equal & (equal.cumsum(dim=-1, dtype=torch.int32) <= free)
    return marks.view(values.shape)


def indices_of(mask: Tensor, count: int) -> Tensor:
    """Where the flat `mask` is True, int64 `[count]`, ascending; `count` is how often it is."""
    return mask.view(-1).nonzero_static(size=count, fill_value=0).view(-1)
