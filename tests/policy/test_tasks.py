"""The task classifier, on prompts that nothing was tuned with."""

import time

import pytest
from policy.held_back_prompts import prompts

from vllm_kvcompress.policy.tasks import shipped_classifier
from vllm_kvcompress.presets import Preset, shipped_presets


def test_held_back_prompts_in_another_style_are_told_apart() -> None:
    right = {"localization": 0, "aggregation": 0}
    for text, label in prompts():
        right[label] += shipped_classifier().classify(text) == label
    print(right)
    assert min(right.values()) >= 15 and sum(right.values()) >= 34, f"of 20 each: {right}"


def test_what_a_chat_template_leaves_at_the_ends_changes_nothing() -> None:
    text, label = prompts()[0]
    assert shipped_classifier().classify(f"system\n\nuser\n\n{text}\n\nassistant\n\n") == label


def test_a_prompt_without_a_known_word_has_a_class_too() -> None:
    assert {shipped_classifier().classify(text) for text in ("", "\n\n", "0 1 2")} <= {
        "localization",
        "aggregation",
    }


def test_a_request_at_the_end_of_a_long_text_is_found() -> None:
    """Longer than 512 tokens can be; `pytest -s` prints the time, nothing asserts it."""
    text = "question of the whole text\n\n" + "and the other words " * 600 + "\n\nsummarize this"
    began = time.perf_counter()
    for _ in range(100):
        shipped_classifier().classify(text)
    print(f"{(time.perf_counter() - began) * 10:.2f} ms per prompt")
    assert shipped_classifier().classify(text) == "aggregation"


def test_the_class_of_a_task_changes_scorer_and_suffix() -> None:
    preset = shipped_presets()["windowkv"]
    fine, whole = preset.for_task("localization"), preset.for_task("aggregation")
    assert (fine.scorer.params["worth"], whole.scorer.params["worth"]) == ("top-half", "mean")
    assert (fine.window_tokens, fine.recent_tokens) == (32, 32)
    assert (whole.window_tokens, whole.recent_tokens) == (16, 16)
    assert preset.variants() == [fine, whole]
    assert preset.for_task(None) == preset


def test_a_preset_changes_for_both_classes_or_for_none() -> None:
    with pytest.raises(ValueError, match="each of localization, aggregation"):
        Preset(
            name="half",
            scorer={"name": "random"},
            allocator={"name": "uniform"},
            tasks={"localization": {"window_tokens": 4}},
        )
