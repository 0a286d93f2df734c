"""Every kernel against its reference in float64, and inside a CUDA graph whose inputs change."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

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


def built() -> dict[str, Any]:
    """Compile the CUDA kernels before anything is timed: the first engine would else do it."""
    need_gpu()
    began = time.perf_counter()
    library = cuda_library()
    found = f"after {time.perf_counter() - began:.0f} s" if library else "none: Triton's are used"
    return {"rows": [{"what": "library of CUDA kernels", "found": found}]}


def against_float64() -> dict[str, Any]:
    """Largest error of each kernel over dtypes and shapes, and its bound."""
    if DEVICE == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
    errors = [*_attention(attend_pages), *_scores(), *_exact(compact)]
    if library := cuda_library():
        cuda = CudaPages(library)
        theirs = (*_attention(cuda.attend_pages), *_exact(cuda.compact))
        errors += [(f"CUDA's {name}", *rest) for name, *rest in theirs]
    rows = [
        {"what": name, "found": f"{error:.2e}", "bound": f"{bound:.0e}", "met": error <= bound}
        for name, error, bound in errors
    ]
    wrong = [row["what"] for row in rows if not row["met"]]
    if wrong:
        return {"state": "failed", "why": f"too far off: {', '.join(wrong)}", "rows": rows}
    return {"rows": rows}


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


def _attention(attend: Callable[..., None]) -> Iterator[tuple[str, float, float]]:
    worst = {dtype: torch.zeros((), dtype=torch.float64, device=DEVICE) for dtype in TOLERANCE}
    for size, dtype, group in SHAPES:
        pool, tables, lengths = paged(LENGTHS, size, dtype)
        keys, values = split_pages(pool)
        queries = torch.randn(len(LENGTHS), group, size, device=DEVICE).to(dtype)
        want = attend_pages_reference(queries, keys, values, tables, lengths, size**-0.5)
        for splits in (1, 3):
            out = torch.full_like(queries, torch.nan)
            attend(queries, keys, values, tables, lengths, size**-0.5, out, splits)
            error = (out.double() - want).abs().max()
            worst[dtype] = torch.maximum(worst[dtype], error)  # NaN stays
    for dtype, bound in TOLERANCE.items():
        yield f"attend_pages {dtype}".replace("torch.", ""), float(worst[dtype]), bound


def _scores() -> Iterator[tuple[str, float, float]]:
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


def _exact(copy: Callable[..., None]) -> Iterator[tuple[str, float, float]]:
    """Kernels that only move or count: they are right or wrong."""
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


def replayed() -> dict[str, Any]:
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
    kept = lengths[0, 0].tolist() == [2 * page_tokens + 150 - 8 * page_tokens] * heads
    row = {"what": "replay after changes", "found": f"{error:.2e}", "bound": "3e-02"}
    if error > 3e-2 or not kept:
        return {"state": "failed", "why": "a replay does not follow its inputs", "rows": [row]}
    return {"rows": [row]}
