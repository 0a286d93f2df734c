"""FastKV (arXiv 2502.01068) against worked numbers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvcompress.accounting import Settings, plan, tsp_selected_tokens
from vllm_kvcompress.policy import Observation, build
from vllm_kvcompress.policy.propagators import AttentionPropagator, select_positions
from vllm_kvcompress.presets import Preset, shipped_presets


def seeded(n: int = 32, window: int = 4) -> Observation:
    """Queries, then keys, of `default_rng(0)`: 4 query heads on 2 KV heads."""
    rng = np.random.default_rng(0)
    queries = torch.from_numpy(rng.standard_normal((4, n, 8)))
    keys = torch.from_numpy(rng.standard_normal((2, n, 8)))
    return Observation(
        queries=queries[:, -window:].transpose(0, 1).unflatten(1, (2, 2)),
        query_positions=torch.arange(n - window, n),
        keys=keys,
        values=keys,
        positions=torch.arange(n),
        valid=None,
        scale=8**-0.5,
    )


@pytest.mark.parametrize(
    ("pool", "kept_of_heads"),
    [("max", [[3, 4, 5, 21], [6, 7, 8, 9]]), ("avg", [[3, 15, 16, 21], None])],
)
def test_worked_example_of_retention(pool, kept_of_heads) -> None:
    preset = shipped_presets()["fastkv"]
    scorer = preset.scorer.model_copy(update={"pool": pool})
    policy = build(preset.model_copy(update={"scorer": scorer}))
    scores = policy.scorer.score(seeded(), 0)
    kept = policy.keep(scores[None], 2 * 8, 1, 0, 4)
    for head, expected in enumerate(kept_of_heads):
        got = kept.indices[kept.indices // 32 == head] % 32
        if expected is not None:
            assert got.tolist() == [*expected, 28, 29, 30, 31]


def test_worked_example_of_propagation() -> None:
    saliency = AttentionPropagator(pool="max", pool_tokens=7).saliency(seeded(), 0)
    chosen = select_positions(saliency, tokens=16, last=4)
    assert chosen.tolist() == [*range(4, 13), 19, 20, 21, *range(28, 32)]


@given(st.integers(1, 60), st.data())
def test_what_goes_on_is_sorted_of_the_asked_size_and_has_the_last(n, data) -> None:
    last = data.draw(st.integers(1, n))
    tokens = data.draw(st.integers(last, n))
    worth = st.sampled_from([0.0, 1.0, 2.5, float("nan"), float("inf")])
    saliency = torch.tensor(data.draw(st.lists(worth, min_size=n, max_size=n)))
    chosen = select_positions(saliency, tokens, last).tolist()
    assert chosen == sorted(set(chosen)) and len(chosen) == tokens
    assert chosen[-last:] == list(range(n - last, n)) and chosen[0] >= 0


def test_a_needle_that_the_window_looks_for_goes_on_from_any_depth() -> None:
    obs = seeded(n=200, window=8)
    for depth in range(0, 192, 16):
        keys = obs.keys.clone()
        keys[:, depth] = obs.queries[-1].mean(dim=1) * 20
        saliency = AttentionPropagator().saliency(replace(obs, keys=keys), 0)
        assert depth in select_positions(saliency, tokens=40, last=8).tolist()


def fastkv(retain: float, tsp: float) -> Settings:
    changes = {"rate": 1 / retain, "tsp_rate": tsp}
    return shipped_presets()["fastkv"].model_copy(update=changes).settings()


@pytest.mark.parametrize(
    ("n", "retain", "tsp", "kept", "selected"),
    [(131072, 0.1, 0.2, 13107, 26214), (8000, 0.1, 0.2, 800, 1600)],
)
def test_budgets_are_the_published_ones_page_by_token(n, retain, tsp, kept, selected) -> None:
    ours = plan(n, 1, 10 * n, fastkv(retain, tsp))
    assert ours.tsp_tokens == selected
    assert ours.arena_blocks in (kept, kept + 1)  # ours rounds up


def test_a_budget_above_the_selected_is_what_the_deep_layers_have() -> None:
    """FastKV keeps 39,321 below and 26,214 above; one block has all layers, so we keep these."""
    ours = plan(131072, 1, 10 * 131072, fastkv(0.3, 0.2))
    assert (ours.tsp_tokens, ours.arena_blocks) == (26214, 26214)


def test_the_cache_budget_and_the_propagated_share_do_not_depend_on_each_other() -> None:
    held = {plan(8192, 32, 10**6, fastkv(0.1, tsp)).arena_blocks for tsp in (0.15, 0.2, 0.5)}
    gone_on = {plan(8192, 32, 10**6, fastkv(keep, 0.2)).tsp_tokens for keep in (0.02, 0.05, 0.1)}
    assert len(held) == len(gone_on) == 1


def test_the_constant_mode_has_the_published_numbers() -> None:
    preset = shipped_presets()["fastkv-constant"]
    assert (preset.tsp_tokens, preset.budget_tokens, preset.window_tokens) == (2048, 512, 8)
    assert plan(100_000, 1, 10**6, preset.settings()).tsp_tokens == 2048
    assert plan(2000, 1, 10**6, preset.settings()).tsp_tokens is None


@given(st.integers(1, 3000), st.sampled_from([1, 16, 32]), st.floats(0.01, 1), st.integers(1, 64))
def test_whole_blocks_and_the_tail_go_on(n, block, rate, window) -> None:
    settings = Settings("x", rate=4, tsp_rate=rate, window_tokens=window, sink_tokens=4)
    selected = tsp_selected_tokens(n, block, settings)
    if selected is None:
        assert n // block * block <= max(int(n * rate), window, 4) + block
        return
    assert (selected - n) % block == 0 and 0 < selected < n
    assert selected >= max(int(n * rate), min(window, n))
    ours = plan(n, block, 10**6, settings)
    assert ours.tsp_tokens == selected and ours.arena_blocks <= selected // block
    assert ours.hit_limit_tokens(window) == 0
    assert ours.next_stop(0) == n and ours.next_stop(n) is None


def test_the_layer_is_the_published_one_and_must_have_layers_above() -> None:
    preset = shipped_presets()["fastkv"]
    assert [preset.last_full_layer(n) for n in (32, 36, 40, 4)] == [15, 17, 19, 1]
    own = preset.model_copy(update={"tsp_layer": 31})
    with pytest.raises(ValueError, match="leaves no layer above it in a model of 32 layers"):
        build(own, layers=32)
    assert build(own, layers=33).propagator == AttentionPropagator()
    assert build(shipped_presets()["kv-compress"], layers=1).propagator is None


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ({"tsp_rate": 0.0}, "greater than 0"),
        ({"tsp_rate": 1.5}, "less than or equal to 1"),
        ({"tsp_tokens": 0}, "greater than or equal to 1"),
        ({"tsp_rate": 0.2, "tsp_tokens": 100}, "exclude each other"),
        ({"tsp_layer": 3}, "no effect without"),
        ({"tsp_layer": -1, "tsp_rate": 0.2}, "greater than or equal to 0"),
    ],
)
def test_bad_numbers_are_refused(own, says) -> None:
    with pytest.raises(ValueError, match=says):
        Preset(name="own", scorer={"name": "random"}, allocator={"name": "uniform"}, **own)
