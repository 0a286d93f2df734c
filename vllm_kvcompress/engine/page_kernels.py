"""Which kernels attend and copy pages: Triton's, CUDA's, or of both the faster at each size.

Decided before a worker serves, for each of the two on its own: CUDA's kernel is found or built,
must agree with its torch reference on this GPU, and is then timed against Triton's, attention at
every size of batch that a graph may capture.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from vllm_kvcompress.accounting import ceil_div
from vllm_kvcompress.config import KernelsName
from vllm_kvcompress.engine.attention.interface import HeadCall
from vllm_kvcompress.engine.attention.triton import newest
from vllm_kvcompress.engine.device_batch import Scratch
from vllm_kvcompress.kernels import (
    MIN_SPLIT_TOKENS,
    attend_pages,
    attend_pages_reference,
    compact,
    compact_reference,
    split_pages,
)
from vllm_kvcompress.kernels.cuda import CudaError, CudaPages
from vllm_kvcompress.kernels.dispatch import Fastest, Kernel
from vllm_kvcompress.kernels.library import cuda_library
from vllm_kvcompress.paging.pool import PagePool

TOLERANCE = 2e-2
MEASURED_ARENA = 64  # blocks
PAGES = 28  # to compare kernels on

logger = logging.getLogger("vllm.kv_compress.kernels")


@dataclass(frozen=True, slots=True)
class Choice:
    """What to call, and whose it is: `triton`, `cuda`, or both where it goes by the call's size."""

    kernel: Kernel
    names: tuple[str, ...]


def load_cuda(asked: KernelsName) -> CudaPages | None:
    """CUDA's kernels, unless Triton's are asked for; building them takes a minute, once.

    Raises:
        ValueError: they are asked for, and there are none, or none that load.
    """
    library = cuda_library() if asked != "triton" else None
    if library is None and asked == "cuda":
        raise ValueError(
            "kernels=cuda: there is no library of the CUDA kernels for this GPU: try "
            "`vllm-kvcompress build-cuda`, or leave kernels out"
        )
    try:
        return CudaPages(library) if library else None
    except OSError as error:
        _is_out(asked, "kernels", f"{library} cannot be loaded: {error}")
        return None


def choose_attention(
    asked: KernelsName,
    cuda: CudaPages | None,
    pool: PagePool,
    group: int,
    scratch: Scratch,
    longest: int,
) -> Choice:
    """Who does what `kernels.attend_pages` does. Writes tables: no request may be there yet.

    Args:
        group: query heads per KV head.
        longest: tokens that a request may have.

    Raises:
        ValueError: CUDA's is asked for and does not compute what it should.
    """
    if cuda is None or _is_out(asked, "attention", _fault_of_attention(cuda, pool, group)):
        return Choice(attend_pages, ("triton",))
    if asked == "cuda":
        return Choice(cuda.attend_pages, ("cuda",))
    attend = Fastest({"triton": attend_pages, "cuda": cuda.attend_pages}, _kind)
    chosen = {}
    for call in batches(pool, group, scratch, longest, longest):
        arguments = newest(call)
        attend.measure(*arguments)
        chosen[_kind(*arguments)] = attend.choice(*arguments)
    by_size = ", ".join(f"{name} to {sequences}" for sequences, name in chosen.items())
    logger.info("kv-compress: the faster attention here, by sequences: %s", by_size)
    return Choice(attend, tuple(sorted({*chosen.values()})))


def choose_compaction(asked: KernelsName, cuda: CudaPages | None, pool: PagePool) -> Choice:
    """Who does what `kernels.compact` does. Writes pages: no request may be there yet.

    Raises:
        ValueError: CUDA's is asked for and does not compute what it should.
    """
    if cuda is None or _is_out(asked, "compaction", _fault_of_compaction(cuda, pool)):
        return Choice(compact, ("triton",))
    if asked == "cuda":
        return Choice(cuda.compact, ("cuda",))
    copy = Fastest({"triton": compact, "cuda": cuda.compact}, lambda *_: None)
    if pool.num_blocks > 1:
        copy.measure(*_compaction(pool))
    logger.info("kv-compress: the faster compaction here: %s", copy.choice())
    return Choice(copy, (copy.choice(),))


def _is_out(asked: KernelsName, what: str, fault: str | None) -> bool:
    """Whether CUDA's kernel has a fault, which is told.

    Raises:
        ValueError: it has, and is asked for.
    """
    if fault and asked == "cuda":
        raise ValueError(f"kernels=cuda: {fault}; leave kernels out")
    if fault:
        logger.warning("kv-compress: no CUDA %s, Triton's instead: %s", what, fault)
    return fault is not None


def _kind(queries: Tensor, *_: Any) -> int:
    """Batches of S sequences are of one kind up to the next power of two, which is returned."""
    return triton.next_power_of_2(len(queries))


def batches(
    pool: PagePool, group: int, scratch: Scratch, longest: int, tokens: int
) -> Iterator[HeadCall]:
    """A batch of each size that graphs may capture, up to the next power of two of sequences.

    Args:
        tokens: of each sequence; fewer where they would have to share pages.
    """
    keys, values = split_pages(pool.cache)
    shuffled = torch.randperm(len(keys), device=pool.device, dtype=torch.int32)
    every = range(1, scratch.rows + 1)
    largest = {triton.next_power_of_2(rows * pool.num_heads): rows for rows in every}
    for rows in largest.values():
        tables, lengths = (part[0].flatten(0, 1) for part in scratch.tables(rows))
        width = min(scratch.width, ceil_div(tokens, pool.page_tokens))
        width = max(1, min(width, len(keys) // len(tables)))
        entries = torch.arange(len(tables) * width, device=pool.device) % len(keys)
        tables[:, :width] = shuffled[entries].view(-1, width)
        lengths.fill_(min(width * pool.page_tokens, tokens))
        queries = keys.new_ones(len(tables), group, pool.head_size)
        yield HeadCall(
            queries=queries,
            keys=keys,
            values=values,
            tables=tables,
            lengths=lengths,
            query_start_loc=scratch.query_start_loc[: len(tables) + 1],
            most_queries=1,
            longest=longest,
            scale=pool.head_size**-0.5,
            softcap=0.0,
            out=torch.empty_like(queries),
        )


def compiling(pool: PagePool, group: int, scratch: Scratch, longest: int) -> Iterator[HeadCall]:
    """A call of every shape that an engine may have to compile a kernel for.

    Each size of batch; of the smallest, every power of two of splits, which steps outside of
    graphs take from their longest sequence; and two query tokens each.
    """
    for number, call in enumerate(batches(pool, group, scratch, longest, 2)):
        yield call
        if number:
            continue
        tokens = MIN_SPLIT_TOKENS
        while tokens < longest:
            yield replace(call, longest=tokens)
            tokens *= 2
        queries = call.queries.repeat(2, 1, 1)
        yield replace(
            call,
            queries=queries,
            query_start_loc=2 * call.query_start_loc,
            most_queries=2,
            out=torch.empty_like(queries),
        )


def _compaction(pool: PagePool) -> tuple[Any, ...]:
    """Arguments of `compact` that keep all of the pool's first blocks, in its last."""
    arena = min(MEASURED_ARENA, pool.num_blocks // 2)
    ids = torch.arange(pool.num_blocks, device=pool.device)
    kept = torch.arange(arena * pool.pages_per_block * pool.page_tokens, device=pool.device)
    tokens = arena * pool.page_tokens
    return (*split_pages(pool.cache), pool.page_ids(ids[:arena]), tokens, kept, ids[-arena:])


def _fault_of_attention(cuda: CudaPages, pool: PagePool, group: int) -> str | None:
    """What is wrong with CUDA's attention on random pages of this pool's shape; None is good."""
    draw = torch.Generator().manual_seed(0)
    rows, size, device = pool.page_tokens, pool.head_size, pool.device
    tables = torch.randperm(PAGES, generator=draw, dtype=torch.int32).view(4, -1).to(device)
    lengths = torch.tensor([0, 1, rows + 1, PAGES // 4 * rows], dtype=torch.int32, device=device)
    queries = torch.randn(4, group, size, generator=draw).to(device, pool.cache.dtype)
    held = *split_pages(_random_pages(pool, draw)), tables, lengths
    wanted = attend_pages_reference(queries, *held, size**-0.5)
    try:
        for splits in (1, 3):
            out = torch.full_like(queries, torch.nan)
            cuda.attend_pages(queries, *held, size**-0.5, out, splits)
            if not torch.allclose(out.double(), wanted, atol=TOLERANCE, rtol=TOLERANCE):
                return f"attention in {splits} splits differs from its reference"
    except CudaError as error:
        return str(error)
    return None


def _fault_of_compaction(cuda: CudaPages, pool: PagePool) -> str | None:
    """What is wrong with CUDA's compaction on random pages of this pool's shape; None is good."""
    draw = torch.Generator().manual_seed(0)
    rows, device = pool.page_tokens, pool.device
    two_heads = torch.arange(20, device=device).view(10, 2).T[None]
    lots = [torch.randperm(10 * rows, generator=draw)[: 2 * rows].sort().values for _ in range(2)]
    kept = torch.cat([lots[0], lots[1] + 10 * rows]).to(device)
    copy = (two_heads, 10 * rows, kept, torch.tensor([10, 13], device=device))
    wanted = _random_pages(pool, draw)
    copied = wanted.clone()
    compact_reference(*split_pages(wanted), *copy)
    try:
        cuda.compact(*split_pages(copied), *copy)
    except CudaError as error:
        return str(error)
    return None if torch.equal(copied, wanted) else "compaction differs from its reference"


def _random_pages(pool: PagePool, draw: torch.Generator) -> Tensor:
    """Pages as the pool's, `[PAGES, 1, B, 2*D]`."""
    shape = (PAGES, *pool.cache.shape[1:])
    return torch.randn(shape, generator=draw).to(pool.device, pool.cache.dtype)
