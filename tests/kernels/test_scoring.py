"""Scores from pages equal the policy room's scorer and the whole attention matrix."""

from dataclasses import asdict

import pytest
import torch
from kernels.caches import DTYPES, noise, poisoned_cache

from vllm_kvcompress.kernels import WindowScore, score_window, score_window_reference
from vllm_kvcompress.policy import Observation
from vllm_kvcompress.policy.attention import AttentionScorer
from vllm_kvcompress.presets import shipped_presets

TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}
PRESETS = {
    name: WindowScore(**preset.scorer.params)
    for name, preset in shipped_presets().items()
    if preset.scorer.name == "attention"
}
RULES = PRESETS | {
    "plain": WindowScore(pool="none"),
    "exclude": WindowScore(exclude_tokens=5, power=1),
    "later average": WindowScore(pool="avg", pool_side="later", pool_tokens=6),
    "even later max": WindowScore(pool_side="later", pool_tokens=4, group="mean", queries="max"),
    "wide": WindowScore(pool_tokens=201),
    "fading": WindowScore(half_life_tokens=1.5, power=1, group="max"),
}


def scored(lengths, rule, window=8, group=2, size=64, page_tokens=16, dtype=torch.float32):
    """The kernel's scores and the reference's; heads are as long as `lengths`."""
    args = inputs(lengths, window, group, size, page_tokens, dtype)
    return score_window(*args, rule), score_window_reference(*args, rule)


def inputs(lengths, window=8, group=2, size=64, page_tokens=16, dtype=torch.float32):
    """Heads of different lengths hold different positions; a lone length, one set for all."""
    cache = poisoned_cache(lengths, page_tokens, size, dtype)
    heads, tokens = len(lengths), max(lengths)
    last = 3 * tokens
    held = [torch.randperm(last)[:length].sort().values for length in lengths]
    positions = torch.stack([torch.cat([p, p.new_full((tokens - len(p),), 9)]) for p in held])
    if len(set(lengths)) == 1:
        positions, last = torch.arange(tokens), tokens
    queries = (noise(window, heads, group, size) * 3).to(dtype)
    asked_at = torch.arange(last - window, last)
    scale = size**-0.5
    return queries, asked_at, cache.keys, cache.tables, cache.lengths, positions, scale


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_every_rule_equals_the_policy_rooms_scorer(rule):
    queries, asked_at, keys, table, lengths, positions, scale = inputs([150, 150])
    held = torch.stack([keys[table[head, :10].long()].flatten(0, 2)[:150] for head in range(2)])
    observation = Observation(queries, asked_at, held, held, positions, None, scale)
    expected = AttentionScorer(**asdict(rule)).score(observation, layer=0)
    scores = score_window(queries, asked_at, keys, table, lengths, positions, scale, rule)
    torch.testing.assert_close(scores, expected, **TOLERANCE)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_every_rule_equals_the_reference_on_heads_of_uneven_length(rule):
    scores, expected = scored([150, 1, 97], rule)
    torch.testing.assert_close(scores.double(), expected, **TOLERANCE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [64, 80, 128, 256])
def test_every_dtype_and_head_size(dtype, size):
    scores, expected = scored([70, 41], WindowScore(), size=size, dtype=dtype)
    torch.testing.assert_close(scores.double(), expected, **TOLERANCE)


@pytest.mark.parametrize("group", range(1, 9))
def test_every_group_size(group):
    scores, expected = scored([50], WindowScore(), group=group)
    torch.testing.assert_close(scores.double(), expected, **TOLERANCE)


@pytest.mark.parametrize("window", [1, 16, 100])
@pytest.mark.parametrize("rule", ["kv-compress", "snapkv", "kv-compress-paper"])
def test_every_window_size(window, rule):
    """Windows beyond one tile of queries too, and beyond the prompt itself."""
    scores, expected = scored([90, 77], RULES[rule], window=window)
    torch.testing.assert_close(scores.double(), expected, **TOLERANCE)


@pytest.mark.parametrize("page_tokens", [1, 8, 32, 48])
def test_every_page_size(page_tokens):
    scores, expected = scored([66, 13], WindowScore(), page_tokens=page_tokens)
    torch.testing.assert_close(scores.double(), expected, **TOLERANCE)


def test_prompts_longer_than_a_split():
    scores, expected = scored([2100, 1025], WindowScore(), window=4, group=1)
    torch.testing.assert_close(scores.double(), expected, **TOLERANCE)


def test_a_single_token_gets_all_attention():
    rule = WindowScore(pool="none")
    scores, _ = scored([1], rule, window=1, group=3)
    torch.testing.assert_close(scores, torch.tensor([[3.0]]))


def test_pooling_comes_before_the_group():
    """The worked example: [0 0 0 0 0 9 0 0 0 0 0 4] and [3 0 ...] pool apart, then add up."""
    mass = torch.tensor([[0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 4.0], [3] + [0] * 11])
    shares = mass / mass.sum(dim=1, keepdim=True)
    queries, keys = torch.zeros(1, 1, 2, 64), torch.zeros(12, 1, 1, 64)
    queries[0, 0, [0, 1], [0, 1]] = 1.0
    keys[:, 0, 0, :2] = shares.clamp(min=1e-30).log().T  # so that softmax gives the shares back
    table, lengths = torch.arange(12)[None], torch.tensor([12], dtype=torch.int32)
    rule = WindowScore(power=1, pool="max", pool_tokens=7, group="sum")
    asked_at, positions = torch.tensor([12]), torch.arange(12)
    scores = score_window(queries, asked_at, keys, table, lengths, positions, 1.0, rule)
    first = torch.tensor([0, 0, 9, 9, 9, 9, 9, 9, 9, 4, 4, 4]) / 13
    second = torch.tensor([3, 3, 3, 3, 0, 0, 0, 0, 0, 0, 0, 0]) / 3
    torch.testing.assert_close(scores, (first + second)[None])
