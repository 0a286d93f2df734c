"""Components are found by name, and every mistake in a preset is answered in one line."""

import sys
from importlib.metadata import EntryPoint

import pytest

from vllm_kvcompress.policy import Policy, Scorer, build, register_scorer, registry
from vllm_kvcompress.policy.attention import AttentionScorer
from vllm_kvcompress.presets import Preset

GLOBAL = {"name": "global"}


def preset(scorer: dict, allocator: dict = GLOBAL, **numbers) -> Preset:
    return Preset(name="test", scorer=scorer, allocator=allocator, **numbers)


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch):
    """A registry whose additions vanish with the test."""
    for kind in ("_scorers", "_allocators", "_selectors"):
        monkeypatch.setattr(registry, kind, dict(getattr(registry, kind)))
    registry._load_third_parties.cache_clear()
    yield
    registry._load_third_parties.cache_clear()


def test_build_makes_what_the_preset_names() -> None:
    policy = build(preset({"name": "attention", "power": 1, "pool_tokens": 5}))
    assert isinstance(policy, Policy)
    assert policy.scorer == AttentionScorer(power=1, pool_tokens=5)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (preset({"name": "nope"}), "unknown scorer 'nope'; known: attention, keydiff, position"),
        (preset({"name": "x" * 5000}), r"unknown scorer 'x{80}'\.\.\. \(5000 characters\)"),
        (preset({"name": "random"}, {"name": "nope"}), "unknown allocator 'nope'; known: adapt"),
        (
            preset({"name": "random"}, selector={"name": "nope"}),
            "unknown selector 'nope'; known: top-k",
        ),
        (
            preset({"name": "attention", "kernel": 5}),
            "scorer 'attention' has no parameter 'kernel'; known: power, queries, half_life",
        ),
        (preset({"name": "position", "seed": 1}), "scorer 'position' has no .* known: none"),
        (preset({"name": "attention", "power": 3}), "scorer 'attention': power: .*1 or 2"),
        (preset({"name": "attention", "pool_tokens": "7"}), "'attention': pool_tokens: .*integer"),
        (preset({"name": "attention", "pool_tokens": 0}), "'attention': pool_tokens: .*greater"),
        (preset({"name": "attention", "pool_tokens": 6}), "'attention': pool_tokens=6 must be odd"),
        (preset({"name": "attention", "score_window": 1}), "'attention': score_window: "),
        (
            preset({"name": "random"}, {"name": "adaptive", "alpha": 2}),
            "allocator 'adaptive': alpha: .*less than or equal to 1",
        ),
        (
            preset({"name": "random"}, {"name": "pyramid", "beta": float("nan")}),
            "allocator 'pyramid': beta: ",
        ),
    ],
)
def test_mistakes_name_component_and_parameter_in_one_line(wrong: Preset, says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        build(wrong)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_name_is_given_once(own_registry) -> None:
    register_scorer("attention")(AttentionScorer)  # again the same: fine
    with pytest.raises(ValueError, match="scorer 'attention' is registered already, by Attention"):
        register_scorer("attention")(lambda: AttentionScorer())


def test_third_parties_register_by_entry_point_loaded_once(
    own_registry, monkeypatch: pytest.MonkeyPatch, tmp_path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "their_policies.py").write_text(
        "from vllm_kvcompress.policy import register_scorer\n"
        "from vllm_kvcompress.policy.scorers import PositionScorer\n"
        "@register_scorer('theirs')\n"
        "def theirs(strength: float = 1.0): return PositionScorer()\n"
    )
    asked = []

    def entry_points(group: str) -> list[EntryPoint]:
        asked.append(group)
        return [
            EntryPoint("broken", "no_such_module_at_all", group),
            EntryPoint("theirs", "their_policies", group),
        ]

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "entry_points", entry_points)
    assert isinstance(build(preset({"name": "theirs", "strength": 2})).scorer, Scorer)
    with pytest.raises(ValueError, match="scorer 'theirs': strength: "):
        build(preset({"name": "theirs", "strength": "much"}))
    assert asked == ["vllm_kvcompress.policies"]
    assert "'broken'" in caplog.text
    sys.modules.pop("their_policies")
