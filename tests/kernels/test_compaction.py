"""Compaction moves exactly the kept tokens, and nothing else."""

import pytest
import torch
from kernels.caches import DTYPES

from vllm_kvcompress.kernels import compact, compact_reference, split_pages

LAYERS, HEADS = 3, 2


def plan(blocks, arena, page_tokens, seed):
    """A prompt's blocks, an arena, and kept tokens that the heads share unevenly."""
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(blocks + arena + 3, generator=draw)
    natural, arena_blocks = order[:blocks], order[blocks : blocks + arena]
    lanes = LAYERS * HEADS
    candidates = natural * lanes + torch.arange(lanes).view(LAYERS, HEADS, 1)
    tokens = blocks * page_tokens
    shares = torch.ones(lanes, dtype=torch.int64)
    while shares.sum() < arena * lanes:
        lane = torch.randint(lanes, (1,), generator=draw)
        shares[lane] += (shares[lane] < blocks).long()
    kept = [
        lane * tokens
        + torch.randperm(tokens, generator=draw)[: int(pages) * page_tokens].sort().values
        for lane, pages in enumerate(shares)
    ]
    return len(order) * lanes, candidates, tokens, torch.cat(kept), arena_blocks


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [64, 80, 128, 256])
def test_every_dtype_and_head_size_is_copied_bit_for_bit(dtype, size):
    check(page_tokens=16, size=size, dtype=dtype, blocks=5, arena=2)


@pytest.mark.parametrize("page_tokens", [1, 8, 24, 32])
@pytest.mark.parametrize("arena", [1, 4])
def test_any_page_size_works(page_tokens, arena):
    check(page_tokens, size=64, dtype=torch.float32, blocks=6, arena=arena)


def check(page_tokens, size, dtype, blocks, arena):
    pages, candidates, tokens, kept, arena_blocks = plan(blocks, arena, page_tokens, seed=size)
    pool = torch.full((pages, 1, page_tokens, 2 * size), torch.nan, dtype=dtype)
    used = candidates.flatten()
    pool[used] = torch.randn(len(used), 1, page_tokens, 2 * size).to(dtype)
    expected = pool.clone()
    compact_reference(*split_pages(expected), candidates, tokens, kept, arena_blocks)
    compact(*split_pages(pool), candidates, tokens, kept, arena_blocks)
    as_bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(pool.view(as_bits), expected.view(as_bits))
    lanes = LAYERS * HEADS
    arena_pages = (arena_blocks[:, None] * lanes + torch.arange(lanes)).flatten()
    assert not pool[arena_pages].isnan().any()


def test_candidates_of_uneven_width_skip_their_padding():
    """After a recompression heads have different many pages: short rows end in page 0."""
    page_tokens, size, lanes = 4, 64, LAYERS * HEADS
    pool = torch.randn(8 * lanes, 1, page_tokens, 2 * size)
    pool[0] = torch.nan
    candidates = torch.randperm(6 * lanes)[: 3 * lanes].add(1).view(LAYERS, HEADS, 3)
    candidates[0, 1, 2] = 0
    tokens, arena_blocks = 3 * page_tokens, torch.tensor([7])
    kept = torch.cat([torch.arange(page_tokens) + lane * tokens + 2 for lane in range(lanes)])
    expected = pool.clone()
    compact_reference(*split_pages(expected), candidates, tokens, kept, arena_blocks)
    compact(*split_pages(pool), candidates, tokens, kept, arena_blocks)
    torch.testing.assert_close(pool, expected, rtol=0, atol=0, equal_nan=True)
