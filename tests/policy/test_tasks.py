"""The task classifier, on prompts that nothing was tuned with."""

import time

import pytest
import torch
from policy.bert import LABELS, save_bert
from policy.held_back_prompts import prompts

from vllm_kvcompress.policy.task_models import task_classifier
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


def test_a_model_named_instead_says_what_transformers_says_of_both_ends(tmp_path) -> None:
    """16 positions: 7 tokens of either end between [CLS] and [SEP]."""
    from transformers import BertForSequenceClassification

    classifier = task_classifier(save_bert(tmp_path))
    model = BertForSequenceClassification.from_pretrained(tmp_path).eval()
    ids = {word: 5 + i for i, word in enumerate("abcde")}
    said = set()
    for words in ("a b", "c d e a b c d", "a b c d e a b" + " e" * 900 + " d c b a e d c"):
        inner = [ids[word] for word in words.split()]
        inner = inner if len(inner) <= 14 else inner[:7] + inner[-7:]
        with torch.inference_mode():
            logits = model(torch.tensor([[2, *inner, 3]])).logits[0]
        assert classifier.classify(words) == LABELS[int(logits.argmax())]
        said.add(classifier.classify(words))
    said |= {classifier.classify(letter) for letter in ids}
    assert said == set(LABELS), "the model says one thing only: the test has no teeth"


def test_a_model_that_cannot_tell_the_classes_is_one_clear_line(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"labels \['qa', 'other'\], but localization and aggr"):
        task_classifier(save_bert(tmp_path / "labels", ("qa", "other")))
    pickled = tmp_path / "pickled"
    save_bert(pickled)
    torch.save({}, pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    for name in (str(pickled), str(tmp_path / "missing")):
        with pytest.raises(ValueError, match="cannot be used: ") as raised:
            task_classifier(name)
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 600
