"""Copy the kept tokens of a compressed request from where they stand into its arena.

The arena's pages are dealt out to the heads in (layer, head) order, so kept token number `i`
goes to page `i // B` of the arena, and page `a` of an arena is page `a % (L*H)` of its block
number `a // (L*H)`: the target needs no table.
"""

import triton
import triton.language as tl
from torch import Tensor


def split_pages(pool: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values `[pages, B, 1, D]` of a pool `[pages, 1, B, 2*D]`, as views."""
    keys, values = pool.transpose(1, 2).chunk(2, dim=-1)
    return keys, values


def compact(
    keys: Tensor,
    values: Tensor,
    candidates: Tensor,
    tokens: int,
    kept: Tensor,
    arena_blocks: Tensor,
) -> None:
    """Copy keys and values of the kept tokens into the pages of `arena_blocks`.

    Args:
        keys, values: `[pages, B, 1, D]`, D contiguous.
        candidates: int64 `[L, H, P]` pages to choose from; no arena page among them.
        tokens: n, the candidate tokens of each head, at most `P * B`.
        kept: int64 `[K*L*H*B]` indices into `[L, H, n]`, ascending, a multiple of B per head.
        arena_blocks: int64 `[K]`.
    """
    layers, heads, pages = candidates.shape
    _, page_tokens, _, size = keys.shape
    lanes = layers * heads
    _copy_page[(len(arena_blocks) * lanes,)](
        keys,
        values,
        candidates.contiguous(),
        kept,
        arena_blocks,
        tokens,
        pages,
        keys.stride(0),
        keys.stride(1),
        values.stride(0),
        values.stride(1),
        LANES=lanes,
        PAGE_TOKENS=page_tokens,
        SIZE=size,
        BLOCK_TOKENS=triton.next_power_of_2(page_tokens),
        BLOCK_SIZE=triton.next_power_of_2(size),
        num_warps=4,
    )


def compact_reference(
    keys: Tensor,
    values: Tensor,
    candidates: Tensor,
    tokens: int,
    kept: Tensor,
    arena_blocks: Tensor,
) -> None:
    """What `compact` must do, token by token."""
    layers, heads, _ = candidates.shape
    lanes, page_tokens = layers * heads, keys.shape[1]
    rows = candidates.flatten(0, 1)
    for ordinal, index in enumerate(kept.tolist()):
        lane, token = divmod(index, tokens)
        source = int(rows[lane, token // page_tokens]), token % page_tokens
        page, offset = divmod(ordinal, page_tokens)
        target = int(arena_blocks[page // lanes]) * lanes + page % lanes, offset
        keys[target] = keys[source]
        values[target] = values[source]


@triton.jit(do_not_specialize=["tokens", "pages"])
def _copy_page(
    keys,
    values,
    candidates,
    kept,
    arena_blocks,
    tokens,
    pages,
    key_page_stride,
    key_token_stride,
    value_page_stride,
    value_token_stride,
    LANES: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    arena_page = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, BLOCK_TOKENS)
    lane = tl.arange(0, BLOCK_SIZE)
    filled = slot < PAGE_TOKENS
    tile = filled[:, None] & (lane < SIZE)[None, :]
    index = tl.load(kept + arena_page * PAGE_TOKENS + slot, mask=filled, other=0)
    token = index % tokens
    candidate = index // tokens * pages + token // PAGE_TOKENS
    source = tl.load(candidates + candidate, mask=filled, other=0)
    offset = token % PAGE_TOKENS
    target = tl.load(arena_blocks + arena_page // LANES) * LANES + arena_page % LANES

    key_from = source * key_page_stride + offset * key_token_stride
    value_from = source * value_page_stride + offset * value_token_stride
    key = tl.load(keys + key_from[:, None] + lane, mask=tile)
    value = tl.load(values + value_from[:, None] + lane, mask=tile)
    key_to = target * key_page_stride + slot * key_token_stride
    value_to = target * value_page_stride + slot * value_token_stride
    tl.store(keys + key_to[:, None] + lane, key, mask=tile)
    tl.store(values + value_to[:, None] + lane, value, mask=tile)
