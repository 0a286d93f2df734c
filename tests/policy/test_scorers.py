"""What each scorer promises, against worked numbers and slow references."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from policy.samples import observation

from vllm_kvcompress.policy import Observation, Policy
from vllm_kvcompress.policy.allocators import UniformAllocator
from vllm_kvcompress.policy.attention import AttentionScorer
from vllm_kvcompress.policy.scorers import KeyDiffScorer, PositionScorer, RandomScorer
from vllm_kvcompress.policy.selectors import TopKSelector

SNAPKV = AttentionScorer(power=1, pool="avg", pool_tokens=5, group="mean", score_window=False)


def paying(attention: list[list[list[float]]]) -> Observation:
    """One KV head whose query heads pay exactly `attention` `[G, w, n]`."""
    paid = torch.tensor(attention)  # [G, w, n]
    _, window, n = paid.shape
    return Observation(
        queries=paid.log().clamp(min=-1e4).permute(1, 0, 2).unsqueeze(1),
        query_positions=torch.arange(n, n + window),
        keys=torch.eye(n).unsqueeze(0),
        values=torch.zeros(1, n, n),
        positions=torch.arange(n),
        valid=None,
        scale=1.0,
    )


def slow_attention_score(obs: Observation, scorer: AttentionScorer) -> np.ndarray:
    """The scorer's formula, one number at a time."""
    window, heads, group, _ = obs.queries.shape
    n = obs.tokens
    out = np.zeros((heads, n))
    for h in range(heads):
        positions = obs.head_positions()[h].tolist()
        pooled = np.zeros((group, n))
        for g in range(group):
            mass = [0.0] * n
            for i in range(window):
                at = int(obs.query_positions[i])
                age, half_life = int(obs.query_positions[-1]) - at, scorer.half_life_tokens or 1e9
                seen = [
                    j
                    for j in range(n)
                    if positions[j] <= at and (obs.valid is None or bool(obs.valid[h, j]))
                ]
                logit = {j: float(obs.queries[i, h, g] @ obs.keys[h, j]) * obs.scale for j in seen}
                total = sum(math.exp(x) for x in logit.values())
                for j in seen:
                    if at - positions[j] >= scorer.exclude_tokens:
                        fade = 0.5 ** (age / half_life)
                        paid = (fade * math.exp(logit[j]) / total) ** scorer.power
                        mass[j] = mass[j] + paid if scorer.queries == "sum" else max(mass[j], paid)
            if not scorer.score_window:
                first = int(obs.query_positions.min())
                mass = [0.0 if positions[j] >= first else m for j, m in enumerate(mass)]
            k = scorer.pool_tokens if scorer.pool != "none" else 1
            before, after = (k - 1, 0) if scorer.pool_side == "later" else (k // 2, k // 2)
            for j in range(n):
                near = mass[max(0, j - before) : j + after + 1]
                pooled[g, j] = sum(near) / k if scorer.pool == "avg" else max(near)
        join = {"sum": pooled.sum, "mean": pooled.mean, "max": pooled.max}[scorer.group]
        out[h] = join(axis=0)
    return out


@pytest.mark.parametrize(
    "scorer",
    [
        AttentionScorer(),
        AttentionScorer(power=1, pool="none", group="max"),
        AttentionScorer(queries="max", half_life_tokens=2.5),
        AttentionScorer(power=1, half_life_tokens=8, exclude_tokens=2),
        AttentionScorer(pool_tokens=6, pool_side="later"),
        AttentionScorer(pool="avg", pool_tokens=4, pool_side="later", exclude_tokens=3),
        AttentionScorer(power=1, exclude_tokens=2),
        AttentionScorer(queries="max", group="max", pool_tokens=4, pool_side="later"),
        AttentionScorer(queries="max", power=1, exclude_tokens=2),
        SNAPKV,
    ],
)
def test_attention_score_equals_a_slow_reference(scorer: AttentionScorer) -> None:
    obs = observation(n=40)
    assert np.allclose(scorer.score(obs, 0).numpy(), slow_attention_score(obs, scorer), atol=1e-5)


def test_heads_with_different_tokens_and_padding_equal_a_slow_reference() -> None:
    obs = observation(n=40)
    positions = torch.stack([torch.arange(0, 80, 2), torch.arange(40)])
    valid = torch.arange(40) < torch.tensor([[40], [31]])
    uneven = replace(obs, positions=positions, valid=valid, query_positions=torch.arange(70, 78))
    got = AttentionScorer().score(uneven, 0).numpy()
    assert np.allclose(got, slow_attention_score(uneven, AttentionScorer()), atol=1e-5)


def test_pooling_comes_before_the_sum_over_the_group() -> None:
    mass = torch.tensor([[[0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 4], [3.0] + [0] * 11]])
    got = AttentionScorer(pool_tokens=7, group="sum").reduce(mass)
    assert got.tolist() == [[3, 3, 12, 12, 9, 9, 9, 9, 9, 4, 4, 4]]


def test_squared_attention_favours_peaks() -> None:
    head = [[0.5, 0.1, 0.1, 0.1, 0.2], [0.0, 0.3, 0.3, 0.3, 0.1]]
    other = [[0.2, 0.4, 0.2, 0.2, 0.0], [0.6, 0.1, 0.1, 0.2, 0.0]]
    l1 = AttentionScorer(power=1, pool="none").score(paying([head]), 0)[0, :4]
    l2 = AttentionScorer(power=2, pool="none").score(paying([head]), 0)[0, :4]
    both = AttentionScorer(power=2, pool="none").score(paying([head, other]), 0)[0, :4]
    assert l1.tolist() == pytest.approx([0.5, 0.4, 0.4, 0.4])
    assert l2.tolist() == pytest.approx([0.25, 0.10, 0.10, 0.10])
    assert both.tolist() == pytest.approx([0.65, 0.27, 0.15, 0.18])


def test_one_query_that_needs_a_key_outweighs_many_that_glance_elsewhere() -> None:
    """Seven queries rest on the first key, one needs the third: to it that is all."""
    rest, need = [0.5, 0.25, 0.0, 0.25], [0.05, 0.05, 0.9, 0.0]
    obs = paying([[rest] * 7 + [need]])
    assert AttentionScorer(power=2, pool="none").score(obs, 0).argmax() == 0
    assert AttentionScorer(power=2, pool="none", queries="max").score(obs, 0).argmax() == 2


def test_later_side_keeps_only_the_continuation() -> None:
    mass = torch.tensor([[[0.0, 0, 5, 0, 0, 0]]])
    got = AttentionScorer(pool_tokens=3, pool_side="later").reduce(mass)
    assert got.tolist() == [[0, 0, 5, 5, 5, 0]]


@pytest.mark.parametrize(("pool", "head0"), [("max", [3, 4, 5, 21]), ("avg", [3, 15, 16, 21])])
def test_snapkv_keeps_the_tokens_of_the_worked_example(pool, head0) -> None:
    draw = np.random.default_rng(0)
    queries = torch.tensor(draw.normal(size=(4, 32, 8)), dtype=torch.float32)
    keys = torch.tensor(draw.normal(size=(2, 32, 8)), dtype=torch.float32)
    obs = Observation(
        queries=queries[:, -4:].reshape(2, 2, 4, 8).permute(2, 0, 1, 3),
        query_positions=torch.arange(28, 32),
        keys=keys,
        values=keys,
        positions=torch.arange(32),
        valid=None,
        scale=8**-0.5,
    )
    for group in ("sum", "mean"):
        scorer = AttentionScorer(power=1, pool=pool, pool_tokens=7, group=group, score_window=False)
        scores = scorer.score(obs, 0).unsqueeze(0)
        snapkv = Policy(scorer, UniformAllocator(), TopKSelector())
        rows = snapkv.keep(scores, total_pages=16, page_tokens=1, sinks=0, recent=4).indices
        assert (rows[:8] % 32).tolist() == [*head0, 28, 29, 30, 31]
        if pool == "max":
            assert (rows[8:] % 32).tolist() == [6, 7, 8, 9, 28, 29, 30, 31]


def test_many_heads_are_scored_in_parts_with_the_same_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    obs = observation(heads=3)
    whole = AttentionScorer().score(obs, 0)
    monkeypatch.setattr("vllm_kvcompress.policy.attention.MAX_LOGITS", 1)
    assert torch.equal(AttentionScorer().score(obs, 0), whole)


def test_keydiff_keeps_the_odd_key_longest() -> None:
    keys = torch.tensor([[[1.0, 0], [1, 0], [0, 1]]])
    obs = replace(observation(n=3, heads=1, window=1), keys=keys)
    got = KeyDiffScorer().score(obs, 0)[0].tolist()
    assert got == pytest.approx([-0.894, -0.894, -0.447], abs=1e-3)


def test_position_score_does_not_look_at_keys_or_values() -> None:
    one, other = observation(seed=1), observation(seed=2)
    got = PositionScorer().score(one, 0)
    assert torch.equal(got, PositionScorer().score(other, 3))
    assert (got.diff(dim=-1) > 0).all()


def test_random_differs_by_seed_layer_and_head_but_not_by_call() -> None:
    obs = observation(n=512)
    first = RandomScorer().score(obs, 0)
    torch.rand(7)
    assert torch.equal(first, RandomScorer().score(obs, 0))
    for other in (
        RandomScorer(seed=1).score(obs, 0)[0],
        RandomScorer().score(obs, 1)[0],
        first[1],
    ):
        assert abs(torch.corrcoef(torch.stack([first[0], other]))[0, 1]) < 0.15
    assert 0.45 < first.mean() < 0.55 and first.min() >= 0 and first.max() < 1


def test_random_depends_on_the_position_not_on_the_place() -> None:
    obs = observation(n=64)
    part = replace(
        obs, keys=obs.keys[:, 10:], values=obs.values[:, 10:], positions=obs.positions[10:]
    )
    assert torch.equal(RandomScorer().score(part, 2), RandomScorer().score(obs, 2)[:, 10:])


@pytest.mark.parametrize("scorer", [AttentionScorer(), SNAPKV, KeyDiffScorer(), RandomScorer()])
def test_padding_changes_no_score(scorer) -> None:
    obs = observation(n=64)
    pad = torch.randn(2, 16, 8)
    padded = replace(
        obs,
        keys=torch.cat([obs.keys, pad], dim=1),
        values=torch.cat([obs.values, pad], dim=1),
        positions=torch.cat([obs.positions, torch.zeros(16, dtype=torch.int64)]),
        valid=(torch.arange(80) < 64).expand(2, 80),
    )
    assert torch.allclose(scorer.score(padded, 0)[:, :64], scorer.score(obs, 0), atol=1e-6)


def test_scorers_say_what_they_need() -> None:
    obs = observation()
    empty = replace(
        obs,
        queries=obs.queries[:0],
        query_positions=obs.query_positions[:0],
        values=obs.values[..., :0],
    )
    for scorer in (KeyDiffScorer(), PositionScorer(), RandomScorer()):
        assert not scorer.needs_queries and not scorer.needs_values
        bare = empty if scorer.needs_keys else replace(empty, keys=empty.keys[..., :0])
        assert torch.equal(scorer.score(bare, 1), scorer.score(obs, 1))
    values = replace(obs, values=obs.values[..., :0])
    assert not AttentionScorer.needs_values
    assert torch.equal(AttentionScorer().score(values, 0), AttentionScorer().score(obs, 0))
