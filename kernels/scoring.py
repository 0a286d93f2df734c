"""Attention that keys receive from a window of queries, read straight from the pages.

Two passes over the keys and no `[heads, w, n]` tensor: the first finds every query's softmax
denominator, the second reduces over the queries what each key gets. What lies between is one
number per (query head, key), which pooling over neighbouring keys needs.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from vllm_kvcompress.kernels.dot import dot

BLOCK_ROWS, BLOCK_TOKENS = 64, 64
SPLIT_TOKENS = 1024
# Numbers that differ from prompt to prompt: none of them is worth compiling a kernel again.
PER_PROMPT = ["window", "tokens", "position_stride", "table_stride"]


@dataclass(frozen=True)
class WindowScore:
    """How attention becomes a score: the fields of the policy `attention`, in its words."""

    power: Literal[1, 2] = 2
    queries: Literal["sum", "max"] = "sum"
    half_life_tokens: float | None = None
    pool: Literal["max", "avg", "none"] = "max"
    pool_tokens: int = 7
    pool_side: Literal["both", "later"] = "both"
    group: Literal["sum", "mean", "max"] = "sum"
    exclude_tokens: int = 0
    score_window: bool = True

    def fade(self, query_positions: Tensor) -> Tensor:
        """f32 `[w]`, minus the logarithm of what each query counts."""
        age = (query_positions[-1] - query_positions).float()
        return age * (math.log(2) / self.half_life_tokens if self.half_life_tokens else 0.0)

    @property
    def reach(self) -> tuple[int, int]:
        """Keys before and after one that enter its pool."""
        if self.pool == "none":
            return 0, 0
        before = self.pool_tokens - 1 if self.pool_side == "later" else self.pool_tokens // 2
        return before, self.pool_tokens - 1 - before


def score_window(
    queries: Tensor,
    query_positions: Tensor,
    keys: Tensor,
    table: Tensor,
    lengths: Tensor,
    positions: Tensor,
    scale: float,
    rule: WindowScore,
) -> Tensor:
    """Score every candidate of one layer: f32 `[H, n]`, higher = keep.

    A query that sees no key counts nothing.

    Args:
        queries: `[w, H, G, D]`, D contiguous.
        query_positions: int64 `[w]`.
        keys: `[pages, B, 1, D]`, D contiguous.
        table: int64 `[H, P]` candidate pages.
        lengths: int32 `[H]` candidates of each head, at most n; the rest is padding.
        positions: int64 `[H, n]`, or `[n]` where all heads share them.
        rule: what to make of the attention.
    """
    window, heads, group, size = queries.shape
    tokens = positions.shape[-1]
    shared = positions.dim() == 1
    splits = triton.cdiv(tokens, SPLIT_TOKENS)
    tiles = triton.cdiv(group * window, BLOCK_ROWS)
    denominators = queries.new_empty((heads, splits, group * window), dtype=torch.float32)
    strides = (queries.stride(0), queries.stride(1), queries.stride(2), *keys.stride()[:2])
    numbers = (scale, window, tokens, 0 if shared else positions.stride(0), table.stride(0))
    block_size = max(16, triton.next_power_of_2(size))
    block_tokens = BLOCK_TOKENS if block_size * keys.element_size() <= 512 else BLOCK_TOKENS // 2
    shape = {"PAGE_TOKENS": keys.shape[1], "SIZE": size, "BLOCK_SIZE": block_size}
    inputs = (queries, query_positions, keys, table, lengths, positions)
    _sum_exponentials[(heads, splits, tiles)](
        *inputs,
        denominators,
        *strides,
        *numbers,
        GROUP=group,
        **shape,
        SPLIT_TOKENS=SPLIT_TOKENS,
        BLOCK_ROWS=BLOCK_ROWS,
        BLOCK_TOKENS=block_tokens,
    )
    mass = queries.new_empty((heads, group, tokens), dtype=torch.float32)
    _reduce_queries[(heads, triton.cdiv(tokens, block_tokens))](
        *inputs,
        denominators.logsumexp(dim=1) + rule.fade(query_positions).repeat(group),
        mass,
        *strides,
        *numbers,
        rule.exclude_tokens,
        GROUP=group,
        **shape,
        SQUARE=rule.power == 2,
        PEAK=rule.queries == "max",
        SCORE_WINDOW=rule.score_window,
        BLOCK_ROWS=min(BLOCK_ROWS, max(16, triton.next_power_of_2(window))),
        BLOCK_TOKENS=block_tokens,
    )
    scores = queries.new_empty((heads, tokens), dtype=torch.float32)
    before, after = rule.reach
    _pool_and_group[(heads, triton.cdiv(tokens, 4 * BLOCK_TOKENS))](
        mass,
        scores,
        tokens,
        before,
        after,
        1.0 / (before + 1 + after),
        GROUP=group,
        AVERAGE=rule.pool == "avg",
        PEAK=rule.group == "max",
        MEAN=rule.group == "mean",
        BLOCK_TOKENS=4 * BLOCK_TOKENS,
    )
    return scores


def score_window_reference(
    queries: Tensor,
    query_positions: Tensor,
    keys: Tensor,
    table: Tensor,
    lengths: Tensor,
    positions: Tensor,
    scale: float,
    rule: WindowScore,
) -> Tensor:
    """What `score_window` must return, f64, by the whole `[H, G, w, n]` matrix."""
    heads, tokens = queries.shape[1], positions.shape[-1]
    positions = positions.expand(heads, tokens)
    visible = positions[:, None] <= query_positions[:, None]  # [H, w, n]
    ordinal = torch.arange(tokens, device=keys.device)
    real = (ordinal < lengths[:, None])[:, None]
    page_tokens = keys.shape[1]
    pages = table.gather(1, (ordinal // page_tokens).expand(heads, tokens)).long()
    pages = pages.masked_fill(~real[:, 0], 0)
    held = keys[pages, ordinal % page_tokens, 0].double()  # [H, n, D]
    held = held.masked_fill(~real[:, 0, :, None], 0.0)
    logits = torch.einsum("whgd,hnd->hgwn", queries.double(), held) * scale
    logits.masked_fill_(~(visible & real)[:, None], -torch.inf)
    attention = torch.softmax(logits, dim=-1).nan_to_num(nan=0.0)
    near = query_positions[:, None] - positions[:, None] < rule.exclude_tokens
    if rule.exclude_tokens:
        attention.masked_fill_(near[:, None], 0.0)
    attention *= torch.exp(-rule.fade(query_positions).double())[:, None]
    powers = attention**rule.power
    mass = powers.amax(dim=2) if rule.queries == "max" else powers.sum(dim=2)
    if not rule.score_window:
        mass.masked_fill_((positions >= query_positions.min())[:, None], 0.0)
    reach = F.pad(mass, rule.reach).unfold(-1, sum(rule.reach) + 1, 1)
    pooled = reach.mean(dim=-1) if rule.pool == "avg" else reach.amax(dim=-1)
    return {"sum": pooled.sum(1), "mean": pooled.mean(1), "max": pooled.amax(1)}[rule.group]


@triton.jit
def _logits(
    queries,
    keys,
    table,
    query_positions,
    positions,
    head,
    group_head,  # [rows] query head inside the group
    index,  # [rows] query inside the window
    wanted,  # [rows] whether the row is one
    token,  # [tokens]
    length,
    query_stride,
    query_head_stride,
    query_group_stride,
    key_page_stride,
    key_token_stride,
    scale,
    position_stride,
    table_stride,
    PAGE_TOKENS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Logits `[rows, tokens]`, `-inf` where there is nothing to see; and both positions."""
    lane = tl.arange(0, BLOCK_SIZE)
    in_size = (lane < SIZE)[None, :]
    query_row = index * query_stride + head * query_head_stride + group_head * query_group_stride
    query = tl.load(queries + query_row[:, None] + lane, mask=wanted[:, None] & in_size, other=0.0)
    real = token < length
    page = tl.load(table + head * table_stride + token // PAGE_TOKENS, mask=real, other=0)
    key_row = page.to(tl.int64) * key_page_stride + token % PAGE_TOKENS * key_token_stride
    key = tl.load(keys + key_row[:, None] + lane, mask=real[:, None] & in_size, other=0.0)
    logits = dot(query, tl.trans(key)) * scale
    asked_at = tl.load(query_positions + index, mask=wanted, other=0)
    stands_at = tl.load(positions + head * position_stride + token, mask=real, other=0)
    seen = wanted[:, None] & real[None, :] & (stands_at[None, :] <= asked_at[:, None])
    return tl.where(seen, logits, float("-inf")), asked_at, stands_at


@triton.jit(do_not_specialize=PER_PROMPT)
def _sum_exponentials(
    queries,
    query_positions,
    keys,
    table,
    lengths,
    positions,
    denominators,  # f32 [H, splits, G*w], logarithms
    query_stride,
    query_head_stride,
    query_group_stride,
    key_page_stride,
    key_token_stride,
    scale,
    window,
    tokens,
    position_stride,
    table_stride,
    GROUP: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    row = tl.program_id(2) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    wanted = row < GROUP * window
    length = tl.load(lengths + head)
    peak = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    begin = split * SPLIT_TOKENS
    for first in range(begin, tl.minimum(begin + SPLIT_TOKENS, length), BLOCK_TOKENS):
        logits, _, _ = _logits(
            queries,
            keys,
            table,
            query_positions,
            positions,
            head,
            row // window,
            row % window,
            wanted,
            first + tl.arange(0, BLOCK_TOKENS),
            length,
            query_stride,
            query_head_stride,
            query_group_stride,
            key_page_stride,
            key_token_stride,
            scale,
            position_stride,
            table_stride,
            PAGE_TOKENS,
            SIZE,
            BLOCK_SIZE,
        )
        new_peak = tl.maximum(peak, tl.max(logits, axis=1))
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        total = total * tl.exp(peak - base) + tl.sum(tl.exp(logits - base[:, None]), axis=1)
        peak = new_peak
    at = denominators + (head * tl.num_programs(1) + split) * GROUP * window + row
    saw_any = total > 0
    denominator = tl.where(saw_any, peak + tl.log(tl.where(saw_any, total, 1.0)), float("-inf"))
    tl.store(at, denominator, mask=wanted)


@triton.jit(do_not_specialize=PER_PROMPT)
def _reduce_queries(
    queries,
    query_positions,
    keys,
    table,
    lengths,
    positions,
    denominators,  # f32 [H, G*w], logarithms
    mass,  # f32 [H, G, n]
    query_stride,
    query_head_stride,
    query_group_stride,
    key_page_stride,
    key_token_stride,
    scale,
    window,
    tokens,
    position_stride,
    table_stride,
    exclude_tokens,
    GROUP: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SQUARE: tl.constexpr,
    PEAK: tl.constexpr,
    SCORE_WINDOW: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    length = tl.load(lengths + head)
    for group_head in range(0, GROUP):
        received = tl.zeros((BLOCK_TOKENS,), tl.float32)
        earliest = tl.full((), 9223372036854775807, tl.int64)
        for first in range(0, window, BLOCK_ROWS):
            index = first + tl.arange(0, BLOCK_ROWS)
            wanted = index < window
            logits, asked_at, stands_at = _logits(
                queries,
                keys,
                table,
                query_positions,
                positions,
                head,
                tl.zeros_like(index) + group_head,
                index,
                wanted,
                token,
                length,
                query_stride,
                query_head_stride,
                query_group_stride,
                key_page_stride,
                key_token_stride,
                scale,
                position_stride,
                table_stride,
                PAGE_TOKENS,
                SIZE,
                BLOCK_SIZE,
            )
            at = denominators + (head * GROUP + group_head) * window + index
            denominator = tl.load(at, mask=wanted, other=0.0)
            far = asked_at[:, None] - stands_at[None, :] >= exclude_tokens
            counts = (logits > float("-inf")) & far
            share = tl.where(counts, tl.exp(logits - denominator[:, None]), 0.0)
            if SQUARE:
                share = share * share
            if PEAK:
                received = tl.maximum(received, tl.max(share, axis=0))
            else:
                received += tl.sum(share, axis=0)
            asked_at = tl.where(wanted, asked_at, 9223372036854775807)
            earliest = tl.minimum(earliest, tl.min(asked_at, axis=0))
        if not SCORE_WINDOW:
            stands_at = tl.load(
                positions + head * position_stride + token, mask=token < length, other=0
            )
            received = tl.where(stands_at >= earliest, 0.0, received)
        at = mass + (head * GROUP + group_head) * tokens + token
        tl.store(at, received, mask=token < tokens)


@triton.jit(do_not_specialize=["tokens"])
def _pool_and_group(
    mass,
    scores,
    tokens,
    before,
    after,
    one_over_pool,
    GROUP: tl.constexpr,
    AVERAGE: tl.constexpr,
    PEAK: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    joined = tl.zeros((BLOCK_TOKENS,), tl.float32)
    for group_head in range(0, GROUP):
        pooled = tl.zeros((BLOCK_TOKENS,), tl.float32)
        for shift in range(-before, after + 1):
            near = token + shift
            at = mass + (head * GROUP + group_head) * tokens + near
            one = tl.load(at, mask=(near >= 0) & (near < tokens), other=0.0)
            pooled = pooled + one if AVERAGE else tl.maximum(pooled, one)
        if AVERAGE:
            pooled *= one_over_pool
        joined = tl.maximum(joined, pooled) if PEAK else joined + pooled
    if MEAN:
        joined /= GROUP
    tl.store(scores + head * tokens + token, joined, mask=token < tokens)
