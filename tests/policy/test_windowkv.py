"""WindowKV (arXiv 2503.17922) against worked numbers and against its own form of the arithmetic."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from policy.samples import observation
from policy.test_scorers import paying

from vllm_kvcompress.policy import Policy, build
from vllm_kvcompress.policy.allocators import GroupPyramidAllocator, UniformAllocator
from vllm_kvcompress.policy.ranking import MarkedScores
from vllm_kvcompress.policy.selectors import TopKSelector
from vllm_kvcompress.policy.windows import WindowScorer
from vllm_kvcompress.presets import Preset, shipped_presets

EXAMPLE = torch.tensor(
    [
        [0.1] * 4 + [0.9, 0, 0, 0] + [0.3, 0.3, 0, 0] + [0.2] * 4 + [0.05, 0.4],
        [0.1] * 4 + [0.1, 0, 0, 0] + [0.3, 0.3, 0, 0] + [0.2] * 4 + [0.05, 0.0],
    ]
)
WORTH = {"mean": [0.1, 0.125, 0.15, 0.2, 0.125], "top-half": [0.1, 0.25, 0.3, 0.2, 0.125]}
BEST = {"mean": [2, 3], "top-half": [1, 2]}


@pytest.mark.parametrize(
    ("layers", "group", "budgets"),
    [
        (32, 8, {2048: [2926, 2341, 1756, 1170], 1024: [1463, 1171, 879, 585]}),
        (32, 8, {512: [732, 586, 440, 292]}),
        (28, 7, {2048: [3072, 2390, 1708, 1024]}),
    ],
)
def test_the_pyramid_has_the_published_budgets(layers, group, budgets) -> None:
    pyramid = GroupPyramidAllocator(group_layers=group)
    for mean, expected in budgets.items():
        groups = layers // group
        assert pyramid.group_tokens(mean, groups).tolist() == expected
        assert abs(sum(expected) * group - layers * mean) <= layers * group
        scores = torch.rand(layers, 1, 4000)
        most = torch.full((layers, 1), 4000)
        pages = pyramid.allocate(MarkedScores(scores), layers * mean, 1, 32, most)
        assert int(pages.sum()) == layers * mean
        assert (pages.view(groups, group) - torch.tensor(expected)[:, None]).abs().max() <= 1


def test_the_floor_is_a_parameter() -> None:
    steep = GroupPyramidAllocator(group_layers=8, floor_layers=1).group_tokens(2048, 4).tolist()
    assert steep == [3950, 2682, 1414, 146]  # the paper's formula, 2048 // 14 in the last group
    assert GroupPyramidAllocator(group_layers=32).group_tokens(2048, 1).tolist() == [2048]
    assert GroupPyramidAllocator(group_layers=16).group_tokens(700, 2).tolist() == [700, 700]


@pytest.mark.parametrize("worth", WORTH)
def test_worked_example_of_windows(worth) -> None:
    scorer = WindowScorer(review_tokens=4, worth=worth)
    assert scorer.window_worth(EXAMPLE, EXAMPLE.shape[1]).tolist() == pytest.approx(
        WORTH[worth], abs=1e-6
    )
    attention = torch.cat([EXAMPLE, torch.zeros(2, 1)], dim=1)  # the suffix, one token
    attention[:, -1] = 6 - attention.sum(dim=1)  # softmax rows sum to one
    obs = paying((attention / 6).unsqueeze(1).tolist())
    obs = replace(obs, query_positions=torch.tensor([18]))
    scores = scorer.score(obs, 0)
    expected = (torch.tensor(WORTH[worth]) / 6).repeat_interleave(4)[:18]
    torch.testing.assert_close(scores[0, :18], expected, atol=1e-6, rtol=0)
    kept = Policy(scorer, UniformAllocator(), TopKSelector()).keep(scores[None], 9, 1, 0, 1)
    windows = [w * 4 + i for w in BEST[worth] for i in range(4)]
    assert kept.indices.tolist() == [*windows, 18]


@pytest.mark.parametrize("worth", WORTH)
def test_scores_equal_those_of_keys_repeated_for_every_query_head(worth) -> None:
    """WindowKV's own code repeats keys to all query heads and loops over windows."""
    obs, size = observation(n=75, heads=2, group=3, window=8), 8
    suffix, review = 8, 75 - 8
    q = obs.queries.flatten(1, 2).numpy()  # [w, Hq, D]
    k = obs.keys.repeat_interleave(3, dim=0).numpy()  # [Hq, n, D]
    logits = np.einsum("whd,hnd->hwn", q, k) * obs.scale
    future = np.arange(75)[None] > (review + np.arange(suffix))[:, None]
    logits[:, future] = -np.inf
    paid = np.exp(logits - logits.max(-1, keepdims=True))
    paid = (paid / paid.sum(-1, keepdims=True)).sum(1)[:, :review]
    expected = np.zeros(review)
    for start in range(0, review, size):
        window = paid[:, start : start + size]
        if worth == "top-half":
            window = -np.sort(-window, axis=1)[:, : size // 2]
        expected[start : start + size] = window.mean()
    scores = WindowScorer(review_tokens=size, worth=worth).score(obs, 0)
    for head in scores:
        np.testing.assert_allclose(head[:review], expected, rtol=1e-5)


def test_what_follows_a_glance_at_a_windows_end_is_worth_as_much_as_the_glance() -> None:
    """Worked by hand: the older of two queries looks at token 3, the newer one at token 13."""
    paid = torch.zeros(2, 18)
    paid[0, 3], paid[1, 13] = 0.8, 0.4
    paid[:, 16] = 1 - paid.sum(dim=1)
    obs = replace(paying(paid[None].tolist()), query_positions=torch.tensor([16, 17]))

    def worth(**options) -> list[float]:
        return WindowScorer(review_tokens=4, **options).score(obs, 0)[0, [0, 4, 8, 12]].tolist()

    assert worth() == pytest.approx([0.2, 0, 0, 0.1], abs=1e-6)
    assert worth(pool_tokens=3) == pytest.approx([0.2, 0.4, 0, 0.3], abs=1e-6)
    assert worth(worth="top-half", pool_tokens=3) == pytest.approx([0.4, 0.8, 0, 0.4], abs=1e-6)
    assert worth(half_life_tokens=1) == pytest.approx([0.1, 0, 0, 0.1], abs=1e-6)
    assert worth(queries="max", half_life_tokens=1) == pytest.approx([0.1, 0, 0, 0.1], abs=1e-6)


def windowkv(**changes) -> Preset:
    return shipped_presets()["windowkv"].model_copy(update=changes)


def scored(policy: Policy, layers) -> tuple[torch.Tensor, list[int]]:
    """Scores of all layers as the engine makes them, and which layers were scored."""
    rows, passes = [], []
    for layer, obs in enumerate(layers):
        if policy.leader(layer) == layer:
            passes.append(layer)
            rows.append(policy.scorer.score(obs, layer))
        else:
            rows.append(rows[policy.leader(layer)])
    return torch.stack(rows), passes


def test_layers_of_a_group_and_all_heads_keep_the_same_whole_windows() -> None:
    """Two prompts one after the other, too: nothing stays from the first."""
    preset = windowkv(group_layers=4)
    policy = build(preset, layers=8)
    for seed in (0, 100):
        layers = [observation(n=272, heads=2, window=16, seed=seed + l) for l in range(8)]
        scores, passes = scored(policy, layers)
        assert passes == [0, 4]
        kept = policy.keep(scores, 8 * 2 * 80, 1, 0, preset.recent_tokens)
        mask = torch.zeros(scores.numel(), dtype=torch.bool)
        mask[kept.indices] = True
        mask = mask.view(scores.shape)
        assert mask[..., -16:].all(), "the suffix is always kept"
        assert (mask[0] == mask[:4]).all() and (mask[4] == mask[4:]).all()
        assert not torch.equal(mask[0], mask[4])
        review = mask[..., :256].unflatten(-1, (-1, 8)).sum(dim=-1)
        for group in (review[0, 0], review[4, 0]):
            assert int(((group > 0) & (group < 8)).sum()) <= 1, "one window may fill what is left"
        alone = policy.keep(scored(policy, layers)[0], 8 * 2 * 80, 1, 0, 16)
        assert torch.equal(alone.indices, kept.indices)


def test_group_layers_must_divide_the_model() -> None:
    assert [windowkv().layers_per_group(n) for n in (32, 28, 4, 30, 1)] == [8, 7, 1, 6, 1]
    assert build(windowkv(group_layers=32), layers=32).leader(31) == 0
    with pytest.raises(ValueError, match="does not divide the model's 32 layers; allowed: 1, 2,"):
        build(windowkv(group_layers=7), layers=32)


@pytest.mark.parametrize(("leader", "leads"), [(0, [0, 0, 2, 2]), (1, [1, 1, 3, 3])])
def test_any_layer_of_a_group_can_lead_it(leader, leads) -> None:
    policy = build(windowkv(group_layers=2, group_leader=leader), layers=4)
    assert [policy.leader(layer) for layer in range(4)] == leads
    assert build(windowkv(group_leader="last"), layers=32).leader(9) == 15


def test_a_leader_outside_its_group_is_refused() -> None:
    with pytest.raises(ValueError, match="group_leader=2, but a group has 2 layer"):
        build(windowkv(group_layers=2, group_leader=2), layers=4)
    with pytest.raises(ValueError, match="group_leader must be 0 with tsp_rate"):
        Preset(**{**windowkv().model_dump(), "group_leader": "last", "tsp_rate": 0.2})


def test_the_last_quarter_gets_as_much_of_the_mean_in_every_model() -> None:
    for layers in (4, 8, 28, 32, 80):
        policy = build(windowkv(), layers=layers)
        groups = layers // policy.group_layers
        assert policy.allocator.group_tokens(1400, groups)[-1] == 800


def test_shared_scores_are_not_for_continual_compression() -> None:
    with pytest.raises(ValueError, match="leave out `continual`"):
        build(windowkv(continual=True))
