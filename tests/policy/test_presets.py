"""Every shipped preset builds, runs, and is the method it is named after."""

from pathlib import Path

import pytest
import torch
from policy.samples import observation

from vllm_kvcompress.policy import build
from vllm_kvcompress.policy.allocators import (
    AdaptiveAllocator,
    GlobalAllocator,
    GroupPyramidAllocator,
    PyramidAllocator,
    UniformAllocator,
)
from vllm_kvcompress.policy.attention import AttentionScorer
from vllm_kvcompress.policy.scorers import KeyDiffScorer, PositionScorer, RandomScorer
from vllm_kvcompress.policy.windows import WindowScorer
from vllm_kvcompress.presets import DEFAULT_PRESET, load_preset, shipped_presets

CONFIGS = Path(__file__).parents[2] / "configs"
SNAPKV = AttentionScorer(power=1, pool="avg", pool_tokens=5, group="mean", score_window=False)
METHODS = {
    "kv-compress": (AttentionScorer, GlobalAllocator),
    "kv-compress-continual": (AttentionScorer, GlobalAllocator),
    "kv-compress-paper": (AttentionScorer, GlobalAllocator),
    "snapkv": (AttentionScorer, UniformAllocator),
    "pyramidkv": (AttentionScorer, PyramidAllocator),
    "adakv": (AttentionScorer, AdaptiveAllocator),
    "fastkv": (AttentionScorer, UniformAllocator),
    "fastkv-constant": (AttentionScorer, UniformAllocator),
    "tsp": (AttentionScorer, UniformAllocator),
    "windowkv": (WindowScorer, GroupPyramidAllocator),
    "windowkv-paper": (WindowScorer, GroupPyramidAllocator),
    "keydiff": (KeyDiffScorer, UniformAllocator),
    "streaming-llm": (PositionScorer, UniformAllocator),
    "random": (RandomScorer, UniformAllocator),
}


def test_the_presets_of_the_documentation_are_shipped() -> None:
    assert set(METHODS) <= set(shipped_presets())
    assert DEFAULT_PRESET == "kv-compress"


@pytest.mark.parametrize("name", METHODS)
def test_preset_builds_runs_and_is_its_method(name: str) -> None:
    preset = load_preset(CONFIGS / f"{name}.yaml")
    assert preset.name == name and preset.description
    policy = build(preset)
    assert (type(policy.scorer), type(policy.allocator)) == METHODS[name]
    layers = [observation(n=256, window=preset.window_tokens, seed=l) for l in range(3)]
    scores = torch.stack([policy.scorer.score(obs, l) for l, obs in enumerate(layers)])
    kept = policy.keep(scores, 3 * 2 * 5, 16, preset.sink_tokens, preset.recent_tokens)
    assert int(kept.pages.sum()) == 30 and len(kept.indices) == 480


def test_continual_is_the_default_done_again() -> None:
    once, again = shipped_presets()["kv-compress"], shipped_presets()["kv-compress-continual"]
    assert again.continual and not once.continual
    same = {"name": once.name, "description": once.description, "continual": False}
    assert again.model_copy(update=same) == once


def test_paper_presets_have_the_published_numbers() -> None:
    presets = shipped_presets()
    paper = presets["kv-compress-paper"]
    assert build(paper).scorer == AttentionScorer(power=2, pool="max", pool_tokens=7, group="sum")
    assert (paper.window_tokens, paper.recent_tokens, paper.sink_tokens) == (32, 32, 0)
    assert all(build(presets[name]).scorer == SNAPKV for name in ("snapkv", "pyramidkv", "adakv"))
    assert presets["streaming-llm"].sink_tokens == 4
    windows = build(presets["windowkv-paper"].for_task("localization"), layers=32)
    assert windows.scorer == WindowScorer(review_tokens=8, worth="top-half")
    assert windows.allocator == GroupPyramidAllocator(group_layers=8, beta=14)
