"""Every kernel against its reference in float64, and inside a CUDA graph whose inputs change."""

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_kvcompress.bench.gpu.row import Row
from vllm_kvcompress.bench.gpu.skipped import need_gpu
from vllm_kvcompress.bench.gpu.where import DEVICE
from vllm_kvcompress.kernels import (
    Arenas,
    WindowScore,
    attend_pages,
    attend_pages_reference,
    compact,
    compact_reference,
    fill_tables,
    fill_tables_reference,
    head_slots,
    head_slots_reference,
    score_window,
    score_window_reference,
    split_pages,
)
from vllm_kvcompress.kernels.cuda import CudaPages
from vllm_kvcompress.kernels.library import cuda_library

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
LENGTHS = [0, 1, 15, 16, 17, 300] if DEVICE == "cpu" else [0, 1, 16, 17, 1000, 8191, 40_000]
BF16 = torch.bfloat16
# Head sizes, dtypes and groups, each beside the usual others: every one is compiled anew.
SHAPES = (
    [(64, dtype, group) for dtype in TOLERANCE for group in (1, 4)]
    if DEVICE == "cpu"
    else [
        *((128, dtype, 4) for dtype in TOLERANCE),
        *((size, BF16, 4) for size in (64, 80, 256)),
        *((128, BF16, group) for group in (1, 7, 8)),
    ]
)
Errors = Iterator[tuple[str, float, float]]
"""Of each kernel: its name, its largest error, and the bound of that."""


def against_float64(_: Mapping[str, float]) -> Iterator[Row]:
    """Largest error of each kernel over dtypes and shapes.

    The library of CUDA kernels is built meanwhile, so that no engine has to: nvcc needs no GPU.
    """
    need_gpu()
    torch.backends.cuda.matmul.allow_tf32 = False
    with ThreadPoolExecutor(1) as pool:
        library = pool.submit(_built)
        yield from _held("Triton's", attend_pages, compact)
        yield from (_row(f"Triton's {name}", *error) for name, *error in (*_scores(), *_tables()))
        path, seconds = library.result()
    found = f"there after {seconds:.0f} s" if path else "none: Triton's are used"
    yield Row("library of CUDA kernels", found)
    if path:
        cuda = CudaPages(path)
        yield from _held("CUDA's", cuda.attend_pages, cuda.compact)


def _built() -> tuple[Path | None, float]:
    began = time.perf_counter()
    return cuda_library(), time.perf_counter() - began


def _held(whose: str, attend: Callable[..., None], copy: Callable[..., None]) -> Iterator[Row]:
    for name, *error in (*_attention(attend), *_compaction(copy)):
        yield _row(f"{whose} {name}", *error)


def _row(what: str, error: float, bound: float) -> Row:
    if not bound:
        return Row(what, f"{error:.0f} differ", "0", error == 0)
    return Row(what, f"off by {error:.1e}", f"<= {bound:.0e}", error <= bound)


def paged(lengths: list[int], size: int, dtype: torch.dtype, page_tokens: int = 16) -> Any:
    """A pool, tables int32 `[S, W]` of shuffled pages, lengths int32 `[S]`; unused pages NaN."""
    torch.manual_seed(0)
    counts = [-(-length // page_tokens) for length in lengths]
    pool = torch.full((sum(counts) + 3, 1, page_tokens, 2 * size), torch.nan, dtype=dtype)
    pages = torch.randperm(len(pool))[: sum(counts)]
    pool[pages] = torch.randn(len(pages), 1, page_tokens, 2 * size).to(dtype)
    tables = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    for row, part in enumerate(pages.split(counts)):
        tables[row, : len(part)] = part
    return pool.to(DEVICE), tables.to(DEVICE), torch.tensor(lengths, dtype=torch.int32).to(DEVICE)


def _attention(attend: Callable[..., None]) -> Errors:
    for dtype, bound in TOLERANCE.items():
        worst = torch.zeros((), dtype=torch.float64, device=DEVICE)
        for size, group in ((size, group) for size, of, group in SHAPES if of == dtype):
            pool, tables, lengths = paged(LENGTHS, size, dtype)
            keys, values = split_pages(pool)
            queries = torch.randn(len(LENGTHS), group, size, device=DEVICE).to(dtype)
            want = attend_pages_reference(queries, keys, values, tables, lengths, size**-0.5)
            for splits in (1, 3):
                out = torch.full_like(queries, torch.nan)
                attend(queries, keys, values, tables, lengths, size**-0.5, out, splits)
                worst = torch.maximum(worst, (out.double() - want).abs().max())  # NaN stays
        yield f"attend_pages {dtype}".replace("torch.", ""), float(worst), bound


def _scores() -> Errors:
    heads, group, size, window = 4, 2, 64, 8
    tokens = 100 if DEVICE == "cpu" else 5000
    for dtype in TOLERANCE:
        pool, tables, lengths = paged([tokens] * heads, size, dtype)
        queries = torch.randn(window, heads, group, size, device=DEVICE).to(dtype)
        asked = torch.arange(tokens - window, tokens, device=DEVICE)
        arguments = (
            queries,
            asked,
            split_pages(pool)[0],
            tables.long(),
            lengths,
            torch.arange(tokens, device=DEVICE),
            size**-0.5,
            WindowScore(),
        )
        error = score_window(*arguments).double() - score_window_reference(*arguments)
        yield f"score_window {dtype}".replace("torch.", ""), float(error.abs().max()), 1e-4


def _compaction(copy: Callable[..., None]) -> Errors:
    """A copy is right or wrong: elements that differ."""
    layers, heads, page_tokens, size, blocks = 2, 4, 16, 64, 12
    lanes = layers * heads
    pool = torch.randn(blocks * lanes, 1, page_tokens, 2 * size, device=DEVICE)
    order = torch.randperm(blocks, device=DEVICE)
    natural, arena = order[:6], order[6:8]
    lane = torch.arange(lanes, device=DEVICE).view(layers, heads, 1)
    candidates, tokens = natural * lanes + lane, 6 * page_tokens
    kept = torch.randperm(lanes * tokens, device=DEVICE)[: 2 * lanes * page_tokens].sort().values
    ours, want = pool.clone(), pool.clone()
    copy(*split_pages(ours), candidates, tokens, kept, arena)
    compact_reference(*split_pages(want), candidates, tokens, kept, arena)
    yield "compact", float((ours != want).sum()), 0.0


def _tables() -> Errors:
    """Page ids, lengths and slots that differ."""
    layers, heads, page_tokens, blocks = 2, 4, 16, 12
    order = torch.randperm(blocks, device=DEVICE)
    natural, arena = order[:6], order[6:8]
    arenas = Arenas.allocate(3, layers, heads, 2, DEVICE)
    pages = torch.tensor([[1, 3, 2, 2], [4, 1, 2, 1]], device=DEVICE)
    arenas.put(1, arena, pages, 4)
    slots = torch.tensor([1, -1, -1], dtype=torch.int32, device=DEVICE)
    table = natural.to(torch.int32).repeat(3, 1)
    seq_lens = torch.tensor([90, 50, 0], dtype=torch.int32, device=DEVICE)
    tables = torch.zeros(layers, 3, heads, 6, dtype=torch.int32, device=DEVICE)
    lengths = torch.full((layers, 3, heads), -1, dtype=torch.int32, device=DEVICE)
    fill_tables(arenas, slots, table, seq_lens, page_tokens, 0, tables, lengths)
    wrong = 0
    for layer in range(layers):
        found = fill_tables_reference(arenas, slots, table, seq_lens, page_tokens, layer)
        for row, of_row in enumerate(found):
            for head, (ids, length) in enumerate(of_row):
                wrong += int(lengths[layer, row, head]) != length
                wrong += tables[layer, row, head, : len(ids)].tolist() != ids
    yield "fill_tables", float(wrong), 0.0

    rows = torch.tensor([0, 0, 1, -1], dtype=torch.int32, device=DEVICE)
    positions = torch.tensor([3, 40, 17, 0], device=DEVICE)
    shape = (table, rows, positions, 1, layers, heads, page_tokens)
    got = torch.zeros(4, heads, dtype=torch.int64, device=DEVICE)
    head_slots(*shape, got)
    yield "head_slots", float((got != head_slots_reference(*shape)).sum()), 0.0


def replayed(_: Mapping[str, float]) -> Iterator[Row]:
    """Tables and attention in one captured graph, replayed after lengths and slots have changed."""
    need_gpu()
    layers, heads, group, size, blocks, rows = 2, 4, 4, 128, 64, 4
    lanes, page_tokens = layers * heads, 16
    pool = torch.randn(blocks * lanes, 1, page_tokens, 2 * size, device=DEVICE).bfloat16()
    keys, values = split_pages(pool)
    arenas = Arenas.allocate(rows, layers, heads, 4, DEVICE)
    order = torch.randperm(blocks, device=DEVICE).to(torch.int32)
    table = order[: rows * 12].view(rows, 12)
    slots = torch.full((rows,), -1, dtype=torch.int32, device=DEVICE)
    seq_lens = torch.ones(rows, dtype=torch.int32, device=DEVICE)
    tables = torch.zeros(1, rows, heads, 12, dtype=torch.int32, device=DEVICE)
    lengths = torch.zeros(1, rows, heads, dtype=torch.int32, device=DEVICE)
    queries = torch.randn(rows * heads, group, size, device=DEVICE).bfloat16()
    out = torch.empty_like(queries)

    def step() -> None:
        fill_tables(arenas, slots, table, seq_lens, page_tokens, 1, tables, lengths)
        flat = tables.view(rows * heads, -1), lengths.view(-1)
        attend_pages(queries, keys, values, *flat, size**-0.5, out, splits=3)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    arenas.put(2, order[-2:], torch.full((layers, heads), 2, device=DEVICE), 8)
    slots[0] = 2
    seq_lens.copy_(torch.tensor([150, 33, 0, 192]))
    graph.replay()
    held = tables.view(rows * heads, -1), lengths.view(-1)
    want: Tensor = attend_pages_reference(queries, keys, values, *held, size**-0.5)
    error = float((out.double() - want).abs().max())
    kept = 2 * page_tokens + 150 - 8 * page_tokens
    bound = TOLERANCE[BF16]
    yield _row("attention of a graph, replayed after its inputs have changed", error, bound)
    what = "tokens in that replay of the heads of a request compressed since"
    found = lengths[0, 0].tolist()
    yield Row(what, " ".join(map(str, found)), f"{kept} in each", found == [kept] * heads)
