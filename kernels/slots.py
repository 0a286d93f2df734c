"""Where a step's new tokens go, head by head: always a natural page."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256


def head_slots(
    block_table: Tensor,
    rows: Tensor,
    positions: Tensor,
    layer: int,
    layers: int,
    heads: int,
    page_tokens: int,
    out: Tensor,
) -> None:
    """Write each token's slot (`page * B + offset`) of every head of one layer.

    Args:
        block_table: int32 `[R, W]` natural blocks, as vLLM keeps them.
        rows: int32 `[T]` the row each token is of; negative for padding.
        positions: int64 `[T]`.
        out: int64 `[T, H]`, contiguous; -1 where the row is padding, as vLLM marks it.
    """
    count = len(rows) * heads
    if not count:
        return
    _write_slots[(triton.cdiv(count, BLOCK),)](
        block_table,
        rows,
        positions,
        out,
        layer * heads,
        count,
        block_table.stride(0),
        LANES=layers * heads,
        HEADS=heads,
        PAGE_TOKENS=page_tokens,
        BLOCK=BLOCK,
    )


def head_slots_reference(
    block_table: Tensor,
    rows: Tensor,
    positions: Tensor,
    layer: int,
    layers: int,
    heads: int,
    page_tokens: int,
) -> Tensor:
    """What `head_slots` must write, int64 `[T, H]`."""
    blocks = block_table[rows.clamp(min=0).long(), positions // page_tokens].long()
    lanes = layer * heads + torch.arange(heads, device=rows.device)
    pages = blocks[:, None] * layers * heads + lanes
    slots = pages * page_tokens + (positions % page_tokens)[:, None]
    return slots.masked_fill(rows[:, None] < 0, -1)


@triton.jit
def _write_slots(
    block_table,
    rows,
    positions,
    out,
    first_lane,
    count,
    table_stride,
    LANES: tl.constexpr,
    HEADS: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    token, head = at // HEADS, at % HEADS
    row = tl.load(rows + token, mask=inside, other=-1)
    real = row >= 0
    position = tl.load(positions + token, mask=real, other=0)
    entry = row.to(tl.int64) * table_stride + position // PAGE_TOKENS
    block = tl.load(block_table + entry, mask=real, other=0).to(tl.int64)
    page = block * LANES + first_lane + head
    slot = tl.where(real, page * PAGE_TOKENS + position % PAGE_TOKENS, -1)
    tl.store(out + at, slot, mask=inside)
