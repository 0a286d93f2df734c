"""Paged caches whose unused parts are poison: whoever reads a NaN shows it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_kvcompress.kernels import split_pages

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DTYPES = tuple(TOLERANCE)


@dataclass
class Cache:
    """Pages of S sequences, in a random order, in a pool with room for more.

    keys, values: `[pages, B, 1, D]`; tables: int32 `[S, width]`; lengths: int32 `[S]`.
    """

    pool: Tensor
    keys: Tensor
    values: Tensor
    tables: Tensor
    lengths: Tensor


def poisoned_cache(
    lengths: list[int], page_tokens: int, size: int, dtype: torch.dtype, seed: int = 0
) -> Cache:
    """Every token of a sequence is random, everything else NaN, unused table entries a trap."""
    draw = torch.Generator().manual_seed(seed)
    counts = [-(-length // page_tokens) for length in lengths]
    pages = sum(counts) + 5
    pool = torch.full((pages, 1, page_tokens, 2 * size), torch.nan, dtype=dtype)
    order = torch.randperm(pages, generator=draw)
    tables = torch.full((len(lengths), max(counts) + 2), 1 << 30, dtype=torch.int32)
    first = 0
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        mine = order[first : first + count]
        tables[row, :count] = mine.to(torch.int32)
        content = torch.full((count * page_tokens, 2 * size), torch.nan, dtype=dtype)
        content[:length] = torch.randn(length, 2 * size, generator=draw).to(dtype)
        pool[mine] = content.view(count, 1, page_tokens, 2 * size)
        first += count
    keys, values = split_pages(pool)
    return Cache(pool, keys, values, tables, torch.tensor(lengths, dtype=torch.int32))


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
