"""What holds whatever the scores, the allocator and the padding."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policy.samples import observation
from torch import Tensor

from vllm_kvcompress.policy import Policy
from vllm_kvcompress.policy.allocators import (
    AdaptiveAllocator,
    GlobalAllocator,
    PyramidAllocator,
    UniformAllocator,
)
from vllm_kvcompress.policy.attention import AttentionScorer
from vllm_kvcompress.policy.scorers import PositionScorer
from vllm_kvcompress.policy.selectors import TopKSelector

ALLOCATORS = [UniformAllocator(), PyramidAllocator(), AdaptiveAllocator(), GlobalAllocator()]
ODD = st.sampled_from([float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 0.0, 1.0, -2.5])


def policy(allocator=None) -> Policy:
    return Policy(AttentionScorer(), allocator or GlobalAllocator(), TopKSelector())


def kept_mask(kept, scores: Tensor) -> Tensor:
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[kept.indices] = True
    return mask.view(scores.shape)


@st.composite
def requests(draw: st.DrawFn):
    """Any scores at all, padding at the end of each head, and feasible numbers."""
    layers, heads, page_tokens = (draw(st.integers(1, 3)) for _ in range(3))
    sinks, recent = draw(st.integers(0, 4)), draw(st.integers(0, 4))
    least = max(1, -(-(sinks + recent) // page_tokens))
    count = layers * heads
    fill = st.integers(least * page_tokens, (least + 4) * page_tokens)
    filled = torch.tensor(draw(st.lists(fill, min_size=count, max_size=count)))
    n = int(filled.max()) + draw(st.integers(0, 3))
    values = draw(st.lists(ODD, min_size=count * n, max_size=count * n))
    scores = torch.tensor(values).view(layers, heads, n)
    valid = (torch.arange(n) < filled.unsqueeze(-1)).view(layers, heads, n)
    total = draw(st.integers(least * count, int((filled // page_tokens).sum())))
    return scores, total, page_tokens, sinks, recent, valid


@given(requests(), st.sampled_from(ALLOCATORS))
def test_any_scores_leave_the_accounting_whole(request_, allocator) -> None:
    scores, total, page_tokens, sinks, recent, valid = request_
    before = scores.clone()
    kept = policy(allocator).keep(scores, total, page_tokens, sinks, recent, valid)
    mask = kept_mask(kept, scores)
    assert int(kept.pages.sum()) == total
    assert len(kept.indices) == total * page_tokens
    assert torch.equal(mask.sum(dim=-1), kept.pages * page_tokens)
    assert (kept.indices.diff() > 0).all()
    assert not (mask & ~valid).any(), "padding was kept"
    for l, h in kept.pages.nonzero().tolist():
        stays = mask[l, h][valid[l, h]]
        assert stays[:sinks].all() and stays[len(stays) - recent :].all()
    assert torch.equal(scores.nan_to_num(), before.nan_to_num()), "the caller's scores changed"


@given(requests(), st.sampled_from(ALLOCATORS))
def test_each_head_keeps_its_best_tokens_and_of_equals_the_earlier(request_, allocator) -> None:
    scores, total, page_tokens, sinks, recent, valid = request_
    kept = policy(allocator).keep(scores, total, page_tokens, sinks, recent, valid)
    n, want = scores.shape[-1], []
    for lane, row in enumerate(scores.flatten(0, 1).tolist()):
        held = int(valid.flatten(0, 1)[lane].sum())
        worth = [-1e30 if x != x else max(-1e30, min(x, 1e30)) for x in row[:held]]
        for i in (*range(min(sinks, held)), *range(max(0, held - recent), held)):
            worth[i] = float("inf")
        best = sorted(range(held), key=lambda i: (-worth[i], i))
        count = int(kept.pages.flatten()[lane]) * page_tokens
        want += [lane * n + i for i in sorted(best[:count])]
    assert kept.indices.tolist() == want


@given(requests(), st.sampled_from(ALLOCATORS))
def test_padding_changes_nothing(request_, allocator) -> None:
    scores, _, page_tokens, sinks, recent, _ = request_
    layers, heads, n = scores.shape
    padded = torch.cat([scores, torch.full((layers, heads, 5), 9.0)], dim=-1)
    valid = (torch.arange(n + 5) < n).expand(padded.shape)
    total = layers * heads * (n // page_tokens)
    alone = policy(allocator).keep(scores, total, page_tokens, sinks, recent)
    other = policy(allocator).keep(padded, total, page_tokens, sinks, recent, valid)
    assert torch.equal(alone.pages, other.pages)
    assert torch.equal(kept_mask(alone, scores), kept_mask(other, padded)[..., :n])


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_batch_equals_single(allocator) -> None:
    """Requests of a batch, computed layer by layer in turn, as one by one."""
    requests = [[observation(n=64 + 32 * r, seed=10 * r + l) for l in range(3)] for r in range(3)]
    judge = policy(allocator)

    def keep(scores: list[Tensor]):
        return judge.keep(torch.stack(scores), total_pages=12, page_tokens=8, sinks=2, recent=4)

    alone = [keep([judge.scorer.score(o, l) for l, o in enumerate(r)]) for r in requests]
    turns = [[judge.scorer.score(r[l], l) for r in reversed(requests)] for l in range(3)]
    batch = [keep([turn[i] for turn in turns]) for i in range(3)][::-1]
    for one, other in zip(alone, batch, strict=True):
        assert torch.equal(one.pages, other.pages)
        assert torch.equal(one.indices, other.indices)


def test_ties_go_to_the_earlier_token_and_the_lower_head() -> None:
    kept = policy().keep(torch.ones(2, 2, 8), total_pages=6, page_tokens=2, sinks=0, recent=0)
    assert kept.pages.tolist() == [[3, 1], [1, 1]]
    assert kept.indices.tolist() == [0, 1, 2, 3, 4, 5, 8, 9, 16, 17, 24, 25]


def test_nan_is_the_lowest_score() -> None:
    scores = torch.tensor([[[float("nan"), -1e9, 5.0, float("nan")]]])
    kept = policy().keep(scores, total_pages=2, page_tokens=1, sinks=0, recent=0)
    assert kept.indices.tolist() == [1, 2]


def test_streaming_llm_keeps_four_sinks_and_the_most_recent() -> None:
    streaming = Policy(PositionScorer(), UniformAllocator(), TopKSelector())
    for seed in (0, 1):
        obs = observation(n=100, seed=seed)
        scores = torch.stack([streaming.scorer.score(obs, l) for l in range(2)])
        kept = streaming.keep(scores, total_pages=2 * 2 * 20, page_tokens=1, sinks=4, recent=0)
        rows = kept.indices.view(4, 20) % 100
        assert rows.tolist() == [[0, 1, 2, 3, *range(84, 100)]] * 4


def test_scores_of_protected_tokens_do_not_matter() -> None:
    scores = torch.rand(2, 2, 64, generator=torch.Generator().manual_seed(3))
    changed = scores.clone()
    changed[0, 0, :3] = 1e9
    changed[1, 1, -2:] = -7.0
    one = policy().keep(scores, total_pages=10, page_tokens=8, sinks=3, recent=2)
    other = policy().keep(changed, total_pages=10, page_tokens=8, sinks=3, recent=2)
    assert torch.equal(one.indices, other.indices)


@pytest.mark.parametrize(
    ("total", "sinks", "says"),
    [
        (3, 0, "4 heads need 1 each"),
        (7, 9, "4 heads need 2 each"),
        (17, 0, "all together 16"),
        (16, 99, "4 heads need 4 each"),
    ],
)
def test_a_total_that_cannot_be_met_is_refused_with_both_sides(total, sinks, says) -> None:
    scores = torch.zeros(2, 2, 32)
    if total == 16:
        assert len(policy().keep(scores, total, 8, sinks, 0).indices) == 128
        return
    with pytest.raises(ValueError, match=says):
        policy().keep(scores, total, 8, sinks, 0)


def test_an_allocator_that_breaks_its_contract_is_found_out() -> None:
    class Generous(UniformAllocator):
        def allocate(self, *task):
            return super().allocate(*task) + 1

    with pytest.raises(RuntimeError, match="Generous allocated 8 pages, not 4"):
        policy(Generous()).keep(torch.zeros(2, 2, 32), 4, 8, 0, 0)


def test_a_selector_that_breaks_its_contract_is_found_out() -> None:
    class Stingy(TopKSelector):
        def select(self, *task):
            return super().select(*task)[1:]

    stingy = Policy(AttentionScorer(), UniformAllocator(), Stingy())
    with pytest.raises(RuntimeError, match="Stingy kept 31 tokens, not 4 pages of 8"):
        stingy.keep(torch.zeros(2, 2, 32), 4, 8, 0, 0)


def test_bf16_and_non_contiguous_inputs_are_fine() -> None:
    obs = observation(n=64)
    strided = replace(
        obs,
        queries=obs.queries.bfloat16(),
        keys=obs.keys.bfloat16().transpose(0, 1).contiguous().transpose(0, 1),
    )
    score = AttentionScorer().score(strided, 0)
    kept = policy().keep(score.bfloat16()[None].transpose(0, 1), 8, 8, 1, 1)
    assert score.dtype == torch.float32 and len(kept.indices) == 64
