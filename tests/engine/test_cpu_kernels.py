"""The C++ that compresses on a CPU, against the torch code that it stands for."""

from dataclasses import replace

import pytest
import torch
from paging.pools import PACKINGS, layer_views

from vllm_kvcompress.engine.cpu_kernels import CPUKernels, instruction_sets
from vllm_kvcompress.paging.pool import PagePool
from vllm_kvcompress.policy import build
from vllm_kvcompress.policy.attention import AttentionScorer
from vllm_kvcompress.policy.observation import Observation
from vllm_kvcompress.presets import shipped_presets

LAYERS, HEADS, GROUP, SIZE, WINDOW = 2, 3, 2, 24, 5
SCALE = 0.2
DEFAULT = AttentionScorer(**shipped_presets()["kv-compress"].scorer.params)
SCORERS = {
    "default": DEFAULT,
    "paper": AttentionScorer(),
    "snapkv": AttentionScorer(power=1, pool="avg", pool_tokens=5, group="mean", score_window=False),
    "no pool": replace(DEFAULT, pool="none", power=1, exclude_tokens=3),
    "wide pool": replace(DEFAULT, pool_tokens=300, half_life_tokens=None),
    "squared peaks": AttentionScorer(queries="max", pool_side="later", score_window=False),
}

pytestmark = pytest.mark.skipif(not instruction_sets(), reason="the C++ was not built")


def pool_of(blocks: int, page_tokens: int, dtype=torch.float32, packing="transposed") -> PagePool:
    """A pool of random keys and values."""
    torch.manual_seed(blocks)
    views = layer_views(blocks, LAYERS, HEADS, page_tokens, SIZE, dtype)
    pool = PagePool(views, PACKINGS[packing](page_tokens, SIZE))
    pool.pages.normal_()
    return pool


def window_of(n: int, scatter: float = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries `[L, w, H, G, D]` and the positions they were asked at, the prompt's last."""
    window = min(WINDOW, n)
    queries = torch.randn(LAYERS, window, HEADS, GROUP, SIZE) * scatter
    return queries, torch.arange(n - window, n)


def by_torch(scorer, pool, queries, asked, pages, valid, positions) -> torch.Tensor:
    """Layer by layer, from the pool's own reading of its keys."""
    scores = []
    for layer in range(LAYERS):
        own = None if valid is None else valid[layer]
        where = positions if positions.dim() == 1 else positions[layer]
        keys = pool.keys(pages[layer])[:, : positions.shape[-1]]
        scores.append(
            scorer.score(Observation(queries[layer], asked, keys, keys, where, own, SCALE), layer)
        )
    return torch.stack(scores)


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("scorer", SCORERS.values(), ids=SCORERS)
def test_scores_from_scattered_pages_are_the_scorer_s(isa, scorer):
    pool = pool_of(20, 32)
    for n in (3, 32, 33, 471):
        queries, asked = window_of(n, scatter=3)
        pages = pool.page_ids(torch.randperm(20)[: -(-n // 32)])
        where = (pages, None, torch.arange(n))
        found = CPUKernels(pool, isa).score(scorer, queries, asked, *where, SCALE)
        torch.testing.assert_close(
            found, by_torch(scorer, pool, queries, asked, *where), rtol=1e-4, atol=1e-7
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("page_tokens", [8, 48])
def test_any_packing_and_dtype_of_pages_is_read(dtype, packing, page_tokens):
    pool, n = pool_of(9, page_tokens, dtype, packing), 8 * page_tokens + 5
    queries, asked = window_of(n)
    where = (pool.page_ids(torch.randperm(9)), None, torch.arange(n))
    for isa in instruction_sets():
        found = CPUKernels(pool, isa).score(DEFAULT, queries.to(dtype), asked, *where, SCALE)
        expected = by_torch(DEFAULT, pool, queries.to(dtype), asked, *where)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("scorer", SCORERS.values(), ids=SCORERS)
def test_heads_that_hold_different_tokens_are_scored_each_by_its_own(isa, scorer):
    """As at a later compression: own positions per head, and padding behind them."""
    pool, n, asked_from = pool_of(30, 32), 128, 1000
    held = torch.randint(40, n + 1, (LAYERS, HEADS))
    positions = torch.rand(LAYERS, HEADS, asked_from).argsort(-1)[..., :n].sort(-1).values
    valid = torch.arange(n) < held[..., None]
    pages = torch.randperm(30 * LAYERS * HEADS)[: LAYERS * HEADS * 4].view(LAYERS, HEADS, 4)
    queries, _ = window_of(n)
    asked = asked_from + torch.arange(WINDOW) - 30
    where = (pages, valid, positions)
    found = CPUKernels(pool, isa).score(scorer, queries, asked, *where, SCALE)
    expected = by_torch(scorer, pool, queries, asked, *where)
    torch.testing.assert_close(found[valid], expected[valid], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("isa", instruction_sets())
def test_equal_keys_have_equal_scores_wherever_they_stand(isa):
    pool, n = pool_of(12, 48), 400
    pool.pages[:] = 0.7
    queries, asked = window_of(n)
    where = (pool.page_ids(torch.randperm(12)[:9]), None, torch.arange(n))
    scores = CPUKernels(pool, isa).score(SCORERS["paper"], queries, asked, *where, SCALE)
    before = scores[..., : n - WINDOW - 4]  # which all queries see
    assert torch.equal(before, before[..., :1].expand_as(before))


def test_what_is_kept_is_worth_what_torch_would_keep():
    pool, n = pool_of(40, 32), 1250
    queries, asked = window_of(n, scatter=3)
    where = (pool.page_ids(torch.randperm(40)), None, torch.arange(n))
    policy = build(shipped_presets()["kv-compress"])
    expected = by_torch(DEFAULT, pool, queries, asked, *where)[..., :1248]
    found = CPUKernels(pool).score(DEFAULT, queries, asked, *where, SCALE)[..., :1248]
    worth = [
        expected.flatten()[policy.keep(scores, 5 * LAYERS * HEADS, 32, 1, 8).indices].sort().values
        for scores in (found, expected)
    ]
    torch.testing.assert_close(*worth, rtol=1e-5, atol=0)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_share_the_heads_and_the_pages(threads):
    pool, n = pool_of(20, 32), 600
    queries, asked = window_of(n)
    where = (pool.page_ids(torch.arange(19)), None, torch.arange(n))
    kernels, before = CPUKernels(pool), torch.get_num_threads()
    expected = kernels.score(DEFAULT, queries, asked, *where, SCALE)
    try:
        torch.set_num_threads(threads)
        assert torch.equal(kernels.score(DEFAULT, queries, asked, *where, SCALE), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("packing", PACKINGS)
def test_copied_tokens_stand_where_torch_puts_them(isa, dtype, packing):
    pool, twin = (pool_of(12, 8, dtype, packing) for _ in range(2))
    lanes, n, arena = LAYERS * HEADS, 5 * 8, torch.tensor([11, 7])
    pages = pool.page_ids(torch.tensor([3, 9, 0, 4, 6]))
    kept = torch.randperm(lanes * n)[: 2 * lanes * 8].sort().values
    CPUKernels(pool, isa).copy(pages, n, kept, arena)
    twin.copy_tokens(pages.flatten()[kept // 8], kept % 8, twin.block_pages(arena))
    assert torch.equal(pool.pages, twin.pages)
    assert not torch.equal(pool.pages, pool_of(12, 8, dtype, packing).pages)


def test_a_query_that_sees_no_key_counts_nothing_and_nan_harms_nobody_else():
    pool, n = pool_of(4, 32), 100
    queries, asked = window_of(n)
    queries[0, 0, 1] = torch.nan
    where = (pool.page_ids(torch.arange(4)), None, torch.arange(n) + 10)
    kernels = CPUKernels(pool)
    scores = kernels.score(DEFAULT, queries, asked - n, *where, SCALE)
    assert not scores.any()
    scores = kernels.score(DEFAULT, queries, asked + 10, *where, SCALE)
    healthy = queries.nan_to_num()
    others = kernels.score(DEFAULT, healthy, asked + 10, *where, SCALE)
    same = torch.tensor([0, 2])
    assert torch.equal(scores[0, same], others[0, same]) and torch.equal(scores[1], others[1])


def test_ids_outside_the_pool_are_refused():
    pool, n = pool_of(4, 32), 100
    queries, asked = window_of(n)
    pages, kernels = pool.page_ids(torch.arange(4)), CPUKernels(pool)
    with pytest.raises(ValueError, match="not of the pool"):
        kernels.score(DEFAULT, queries, asked, pages + 1, None, torch.arange(n), SCALE)
    kept = torch.arange(LAYERS * HEADS * 32)
    for wrong in ((pages + 1, 96, kept, torch.tensor([3])), (pages, 96, kept, torch.tensor([4])),
                  (pages, 96, kept + 96 * LAYERS * HEADS, torch.tensor([3]))):  # fmt: skip
        with pytest.raises(ValueError, match=r"not of the pool|no candidate"):
            kernels.copy(*wrong)
