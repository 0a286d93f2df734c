"""Decode attention over per-head pages: one query token per sequence, split over its keys.

A sequence is a (request, KV head); its G query heads share every key, so they are the rows of
one tile. Long sequences are cut into splits that are attended alone and then joined
(Flash-Decoding); how many is fixed before launch, so lengths may change inside a CUDA graph.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_kvcompress.kernels.dot import dot

BLOCK_TOKENS = 64
MIN_SPLIT_TOKENS = 256
JOINED_SPLITS = 8  # loaded at once


def splits_for(sequences: int, longest: int, processors: int) -> int:
    """Splits that fill `processors` about four times over, none below `MIN_SPLIT_TOKENS`.

    Args:
        longest: an upper bound of the lengths that the host knows, in tokens.
    """
    wanted = triton.cdiv(4 * processors, max(1, sequences))
    return max(1, min(wanted, triton.cdiv(longest, MIN_SPLIT_TOKENS)))


def attend_pages(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    lengths: Tensor,
    scale: float,
    out: Tensor,
    splits: int = 1,
    softcap: float = 0.0,
) -> None:
    """Write each sequence's attention into `out`; a sequence of length 0 gets zeros.

    Args:
        queries: `[S, G, D]`; the dtype of the cache.
        keys, values: `[pages, B, 1, D]`, D contiguous.
        tables: int32 `[S, width]`; entries behind a sequence's last page are not read.
        lengths: int32 `[S]` tokens, at most `width * B`.
        out: `[S, G, D]`.
        splits: see `splits_for`.
        softcap: logits become `softcap * tanh(logits / softcap)`; 0 leaves them.
    """
    sequences, group, size = queries.shape
    block_size = triton.next_power_of_2(size)
    partial = queries.new_empty((splits, sequences, group, size), dtype=torch.float32)
    weights = queries.new_empty((splits, sequences, group), dtype=torch.float32)
    _attend_split[(sequences, splits)](
        queries,
        keys,
        values,
        tables,
        lengths,
        partial,
        weights,
        out,
        scale,
        softcap,
        queries.stride(0),
        queries.stride(1),
        out.stride(0),
        out.stride(1),
        keys.stride(0),
        keys.stride(1),
        values.stride(0),
        values.stride(1),
        tables.stride(0),
        PAGE_TOKENS=keys.shape[1],
        GROUP=group,
        SIZE=size,
        BLOCK_GROUP=max(16, triton.next_power_of_2(group)),  # the least that tl.dot takes
        BLOCK_SIZE=max(16, block_size),
        BLOCK_TOKENS=BLOCK_TOKENS if block_size <= 128 else BLOCK_TOKENS // 2,
        SOFTCAP=softcap > 0,
        WHOLE=splits == 1,
        num_warps=4,
        num_stages=3,
    )
    if splits == 1:
        return
    _join_splits[(sequences, group)](
        partial,
        weights,
        out,
        out.stride(0),
        out.stride(1),
        sequences,
        splits,
        GROUP=group,
        SIZE=size,
        BLOCK_SIZE=block_size,
        BLOCK_SPLITS=triton.next_power_of_2(splits),
        CHUNK=JOINED_SPLITS,
        num_warps=1,
    )


def attend_pages_reference(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    lengths: Tensor,
    scale: float,
    softcap: float = 0.0,
) -> Tensor:
    """What `attend_pages` must write, f64 `[S, G, D]`, sequence by sequence."""
    out = torch.zeros(queries.shape, dtype=torch.float64, device=queries.device)
    page_tokens = keys.shape[1]
    for sequence, length in enumerate(lengths.tolist()):
        if not length:
            continue
        pages = tables[sequence, : -(-length // page_tokens)].long()
        held_keys = keys[pages].flatten(0, 2)[:length].double()
        held_values = values[pages].flatten(0, 2)[:length].double()
        logits = queries[sequence].double() @ held_keys.T * scale
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        out[sequence] = torch.softmax(logits, dim=-1) @ held_values
    return out


@triton.jit
def _attend_split(
    queries,
    keys,
    values,
    tables,
    lengths,
    partial,  # f32 [splits, S, G, D], each split normalised
    weights,  # f32 [splits, S, G], log of each split's softmax denominator
    out,  # [S, G, D], written here where there is one split
    scale,
    softcap,
    query_stride,
    query_head_stride,
    out_stride,
    out_head_stride,
    key_page_stride,
    key_token_stride,
    value_page_stride,
    value_token_stride,
    table_stride,
    PAGE_TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WHOLE: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    length = tl.load(lengths + sequence)
    span = tl.cdiv(tl.cdiv(length, BLOCK_TOKENS), tl.num_programs(1)) * BLOCK_TOKENS
    begin = split * span
    end = tl.minimum(begin + span, length)

    head = tl.arange(0, BLOCK_GROUP)
    lane = tl.arange(0, BLOCK_SIZE)
    in_group, in_size = head < GROUP, lane < SIZE
    tile = in_group[:, None] & in_size[None, :]
    row = (split * tl.num_programs(0) + sequence) * GROUP + head
    out_at = out + sequence * out_stride + head[:, None] * out_head_stride + lane
    if begin >= end:
        if WHOLE:
            tl.store(out_at, tl.zeros(tile.shape, out.dtype.element_ty), mask=tile)
        else:
            tl.store(weights + row, float("-inf"), mask=in_group)
        return

    query_at = queries + sequence * query_stride + head[:, None] * query_head_stride + lane
    query = tl.load(query_at, mask=tile, other=0.0)
    peak = tl.full((BLOCK_GROUP,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_GROUP,), tl.float32)
    mixed = tl.zeros((BLOCK_GROUP, BLOCK_SIZE), tl.float32)
    for first in range(begin, end, BLOCK_TOKENS):
        token = first + tl.arange(0, BLOCK_TOKENS)
        held = token < end
        page = tl.load(tables + sequence * table_stride + token // PAGE_TOKENS, mask=held, other=0)
        page, offset = page.to(tl.int64), token % PAGE_TOKENS
        here = held[:, None] & in_size[None, :]
        key_row = page * key_page_stride + offset * key_token_stride
        key = tl.load(keys + key_row[:, None] + lane, mask=here, other=0.0)
        logits = dot(query, tl.trans(key)) * scale
        if SOFTCAP:
            logits = softcap * (2 * tl.sigmoid(2 * logits / softcap) - 1)
        logits = tl.where(held[None, :], logits, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(logits, axis=1))
        faded = tl.exp(peak - new_peak)
        share = tl.exp(logits - new_peak[:, None])
        value_row = page * value_page_stride + offset * value_token_stride
        value = tl.load(values + value_row[:, None] + lane, mask=here, other=0.0)
        total = total * faded + tl.sum(share, axis=1)
        mixed = mixed * faded[:, None] + dot(share.to(value.dtype), value)
        peak = new_peak
    result = mixed / total[:, None]
    if WHOLE:
        tl.store(out_at, result.to(out.dtype.element_ty), mask=tile)
    else:
        tl.store(partial + row[:, None] * SIZE + lane, result, mask=tile)
        tl.store(weights + row, peak + tl.log(total), mask=in_group)


@triton.jit(do_not_specialize=["sequences", "splits"])
def _join_splits(
    partial,
    weights,
    out,
    out_stride,
    out_head_stride,
    sequences,
    splits,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    row = sequence * GROUP + head
    lane = tl.arange(0, BLOCK_SIZE)
    split = tl.arange(0, BLOCK_SPLITS)
    rows = sequences * GROUP
    every = tl.load(weights + split * rows + row, mask=split < splits, other=float("-inf"))
    peak = tl.max(every, axis=0)
    total = 0.0
    mixed = tl.zeros((BLOCK_SIZE,), tl.float32)
    for first in range(0, splits, CHUNK):
        these = first + tl.arange(0, CHUNK)
        weight = tl.load(weights + these * rows + row, mask=these < splits, other=float("-inf"))
        written = weight > float("-inf")
        share = tl.where(written, tl.exp(weight - peak), 0.0)
        at = partial + (these * rows + row)[:, None] * SIZE + lane
        part = tl.load(at, mask=written[:, None] & (lane < SIZE)[None, :], other=0.0)
        mixed += tl.sum(share[:, None] * part, axis=0)
        total += tl.sum(share, axis=0)
    result = mixed / tl.where(total > 0, total, 1.0)
    at = out + sequence * out_stride + head * out_head_stride + lane
    tl.store(at, result.to(out.dtype.element_ty), mask=lane < SIZE)
