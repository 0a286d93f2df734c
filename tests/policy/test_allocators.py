"""Pages are dealt out exactly, within bounds, and to whom the method says."""

import itertools
from fractions import Fraction
from math import floor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policy.samples import whole_scores
from torch import Tensor

from vllm_kvcompress.policy.allocators import (
    AdaptiveAllocator,
    GlobalAllocator,
    PyramidAllocator,
    UniformAllocator,
)
from vllm_kvcompress.policy.interfaces import Allocator
from vllm_kvcompress.policy.pages import apportion
from vllm_kvcompress.policy.ranking import MarkedScores

ALLOCATORS = [
    UniformAllocator(),
    PyramidAllocator(uniform_below_tokens=0),
    PyramidAllocator(beta=2, uniform_below_tokens=1),
    AdaptiveAllocator(),
    AdaptiveAllocator(alpha=0),
    GlobalAllocator(),
]


def allocate(allocator: Allocator, scores: Tensor, total: int, page_tokens: int, least: int = 1):
    most = torch.full(scores.shape[:2], scores.shape[-1] // page_tokens)
    return allocator.allocate(MarkedScores(scores), total, page_tokens, least, most)


def greedy_global(scores: Tensor, total: int, page_tokens: int, least: int, most: Tensor):
    """Page by page to the head that offers the most for it; plain Python."""
    layers, heads, _ = scores.shape
    pages = {(l, h): least for l, h in itertools.product(range(layers), range(heads))}
    ranked = {lh: sorted(scores[lh].tolist(), reverse=True) for lh in pages}

    def offer(lh: tuple[int, int]) -> float:
        start = pages[lh] * page_tokens
        return sum(ranked[lh][start : start + page_tokens])

    for _ in range(total - sum(pages.values())):
        able = [lh for lh in sorted(pages) if pages[lh] < most[lh]]
        pages[max(able, key=lambda lh: (offer(lh), [-x for x in lh]))] += 1
    return torch.tensor([[pages[l, h] for h in range(heads)] for l in range(layers)])


@st.composite
def tasks(draw: st.DrawFn):
    """Scores, B and feasible (total, least, most)."""
    scores, page_tokens = draw(whole_scores())
    layers, heads, n = scores.shape
    least = draw(st.integers(0, n // page_tokens))
    room = st.integers(least, n // page_tokens)
    count = layers * heads
    most = torch.tensor(draw(st.lists(room, min_size=count, max_size=count)))
    total = draw(st.integers(least * count, int(most.sum())))
    return scores, page_tokens, total, least, most.view(layers, heads)


@given(tasks(), st.sampled_from(ALLOCATORS))
def test_sum_is_exact_and_bounds_hold(task, allocator: Allocator) -> None:
    scores, page_tokens, total, least, most = task
    pages = allocator.allocate(MarkedScores(scores), total, page_tokens, least, most)
    assert pages.dtype == torch.int64 and pages.shape == scores.shape[:2]
    assert int(pages.sum()) == total
    assert (pages >= least).all() and (pages <= most).all()


@given(tasks())
def test_global_equals_a_slow_greedy_reference(task) -> None:
    scores, page_tokens, total, least, most = task
    got = GlobalAllocator().allocate(MarkedScores(scores), total, page_tokens, least, most)
    assert torch.equal(got, greedy_global(scores, total, page_tokens, least, most))


@given(whole_scores(pages=3, tokens=2), st.data())
def test_global_keeps_the_most_score_of_all_possible_deals(task, data) -> None:
    scores, page_tokens = task
    scores = scores[:1]
    heads, room = scores.shape[1], scores.shape[-1] // page_tokens
    total = data.draw(st.integers(heads, heads * room))

    def worth(pages) -> float:
        best = scores[0].sort(descending=True).values
        return sum(float(best[h, : p * page_tokens].sum()) for h, p in enumerate(pages))

    deals = itertools.product(range(1, room + 1), repeat=heads)
    got = allocate(GlobalAllocator(), scores, total, page_tokens)[0].tolist()
    assert worth(got) == max(worth(deal) for deal in deals if sum(deal) == total)


@given(whole_scores(), st.integers(1, 4), st.data())
def test_no_evicted_page_was_worth_more_than_a_kept_one(task, least, data) -> None:
    scores, page_tokens = task
    room = scores.shape[-1] // page_tokens
    least = min(least, room)
    count = scores.shape[0] * scores.shape[1]
    total = data.draw(st.integers(least * count, room * count))
    pages = allocate(GlobalAllocator(), scores, total, page_tokens, least)
    prices = scores.sort(descending=True).values.unflatten(-1, (room, page_tokens)).sum(-1)
    page = torch.arange(room)
    competing = page >= least
    kept = prices[(page < pages.unsqueeze(-1)) & competing]
    evicted = prices[(page >= pages.unsqueeze(-1)) & competing]
    if len(kept) and len(evicted):
        assert kept.min() >= evicted.max()


def test_global_starves_the_layer_of_small_scores_and_uniform_does_not() -> None:
    layer = torch.rand(4, 256, generator=torch.Generator().manual_seed(0))
    scores = torch.stack([layer, layer * 10])
    rich = allocate(GlobalAllocator(), scores, 64, 8)
    assert rich[0].sum() <= 8 and rich[1].sum() >= 56
    assert (allocate(UniformAllocator(), scores, 64, 8) == 8).all()


def test_protected_tokens_do_not_make_a_head_richer() -> None:
    draw = torch.Generator().manual_seed(1)
    scores = torch.rand(2, 2, 64, generator=draw)
    marked = scores.clone()
    marked[..., :4] = torch.inf
    modest = scores.clone()
    modest[..., :4] = 1.0  # best of its head, but only just
    # One page of 4 is spoken for in every head either way; the rest must go the same way.
    got = allocate(GlobalAllocator(), marked, 20, 4, least=1)
    assert torch.equal(got, allocate(GlobalAllocator(), modest, 20, 4, least=1))


def test_pyramid_gives_the_worked_numbers() -> None:
    tokens = PyramidAllocator(beta=20, uniform_below_tokens=64).layer_tokens(32, 2000, 8000)
    assert tokens[0] == 3900 and tokens[31] == 100 and tokens.sum() == pytest.approx(64_000)
    assert tokens.diff().tolist() == pytest.approx([-3800 / 31] * 31)
    assert (PyramidAllocator().layer_tokens(32, 500, 1000) == 500).all()


def test_pyramid_in_pages_falls_from_layer_to_layer() -> None:
    allocator = PyramidAllocator(beta=20, uniform_below_tokens=64)
    pages = allocate(allocator, torch.zeros(32, 2, 8000), 32 * 2 * 125, 16)
    assert (pages[:-1] >= pages[1:]).all() and (pages[:, 0] == pages[:, 1]).all()
    assert pages[0, 0] == 244 and pages[31, 0] == 6  # 3900 and 100 tokens in pages of 16


@pytest.mark.parametrize("kept", [10, 37])
def test_adaptive_moves_tokens_only_inside_a_layer_and_leaves_a_fifth(kept: int) -> None:
    draw = torch.Generator().manual_seed(2)
    loud = torch.tensor([[1.0], [2], [50], [100]])
    scores = torch.rand(3, 4, 200, generator=draw) * loud * torch.tensor([1.0, 9, 99]).view(3, 1, 1)
    pages = allocate(AdaptiveAllocator(alpha=0.2), scores, 3 * 4 * kept, 1, least=0)
    assert (pages.sum(dim=-1) == 4 * kept).all()
    assert (pages >= int(0.2 * kept)).all()
    assert (pages[:, 3] > kept).all() and (pages[:, 0] < kept).all()


def test_remainder_goes_to_the_largest_fraction_and_ties_to_the_lower() -> None:
    free = torch.full((3,), 100)
    assert apportion(torch.tensor([1.0, 1, 1]), 8, free * 0, free).tolist() == [3, 3, 2]
    assert apportion(torch.tensor([2.0, 3, 5]), 7, free * 0, free).tolist() == [1, 2, 4]
    assert apportion(torch.tensor([1.0, 1, 8]), 10, free * 0, free * 0 + 5).tolist() == [3, 2, 5]


def slow_apportion(shares: list[float], total: int, least: list[int], most: list[int]) -> list[int]:
    """Bounds become final one after the other, in exact fractions; then largest remainders."""
    weights = [max(Fraction(share), Fraction(1e-9)) for share in shares]
    final: dict[int, int] = {}
    while True:
        free = [i for i in range(len(shares)) if i not in final]
        rest = total - sum(final.values())
        scale = rest / sum(weights[i] for i in free) if free else 0
        quotas = [final[i] if i in final else weights[i] * scale for i in range(len(shares))]
        low = {i: least[i] for i in free if quotas[i] < least[i]}
        high = {i: most[i] for i in free if quotas[i] > most[i]}
        if not low and not high:
            break
        missing = sum(bound - quotas[i] for i, bound in low.items())
        excess = sum(quotas[i] - bound for i, bound in high.items())
        final |= low if missing >= excess else high
    parts = [floor(quota) for quota in quotas]
    order = sorted(range(len(shares)), key=lambda i: (parts[i] - quotas[i], i))
    for i in order[: total - sum(parts)]:
        parts[i] += 1
    return parts


@st.composite
def shared_out(draw: st.DrawFn):
    count = draw(st.integers(1, 9))
    shares = draw(
        st.lists(
            st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0, 3.0, 40.0]), min_size=count, max_size=count
        )
    )
    least = draw(st.lists(st.integers(0, 6), min_size=count, max_size=count))
    most = [low + draw(st.integers(0, 12)) for low in least]
    return shares, draw(st.integers(sum(least), sum(most))), least, most


@given(shared_out())
def test_apportion_equals_exact_fractions(task) -> None:
    shares, total, least, most = task
    got = apportion(torch.tensor(shares), total, torch.tensor(least), torch.tensor(most))
    assert got.tolist() == slow_apportion(shares, total, least, most)
