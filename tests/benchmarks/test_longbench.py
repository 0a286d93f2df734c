"""LongBench and LongBench-v2, from small files of the same schema."""

import json
import re
import zipfile
from random import Random

import datasets
import huggingface_hub
import pytest

from vllm_kvcompress.bench.quality.longbench import (
    SUBSETS,
    TEMPLATE_TOKENS,
    Reading,
    both_ends,
    longbench,
    longbench_v2,
)
from vllm_kvcompress.bench.quality.scoring import score

# Tokens and metric of each subset as LongBench publishes them.
PUBLISHED = {
    "narrativeqa": (128, "f1"),
    "qasper": (128, "f1"),
    "multifieldqa_en": (64, "f1"),
    "hotpotqa": (32, "f1"),
    "2wikimqa": (32, "f1"),
    "musique": (32, "f1"),
    "gov_report": (512, "rouge"),
    "qmsum": (512, "rouge"),
    "multi_news": (512, "rouge"),
    "trec": (64, "choice"),
    "triviaqa": (32, "f1"),
    "samsum": (128, "rouge"),
    "passage_count": (32, "number"),
    "passage_retrieval_en": (32, "number"),
    "lcc": (64, "code"),
    "repobench-p": (64, "code"),
}
ANSWERS = {
    "trec": "Manner of an action",
    "passage_count": "7",
    "passage_retrieval_en": "Paragraph 7",
    "lcc": "    return a + b",
    "repobench-p": "    return a + b",
}
NO_INPUT = ("gov_report", "multi_news", "passage_count", "lcc")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def words(text):
    return len(text.split())


def record(name, number, context_words=300):
    free = [f"the answer {number}", f"number {number}"]
    return {
        "input": "" if name in NO_INPUT else f"What is {number}? {{}}",
        "context": " ".join(f"w{number}.{i}" for i in range(context_words)),
        "answers": [ANSWERS[name]] if name in ANSWERS else free,
        "length": context_words,
        "dataset": name,
        "language": "en",
        "all_classes": None,
        "_id": f"{number:048x}",
    }


def record_v2(number, length):
    return {
        "_id": f"{number:024x}",
        "domain": "Code Repository Understanding",
        "sub_domain": "Code repo QA",
        "difficulty": "easy",
        "length": length,
        "question": f"Which one is {number}?",
        **{f"choice_{letter}": f"the {letter} of {number} {{x}}" for letter in "ABCD"},
        "answer": "ABCD"[number % 4],
        "context": " ".join(f"w{number}.{i}" for i in range(200)),
    }


def lines(records):
    return "".join(json.dumps(each) + "\n" for each in records)


@pytest.fixture
def folder(tmp_path):
    for name in SUBSETS:
        text = lines(record(name, number) for number in range(8))
        (tmp_path / f"{name}.jsonl").write_text(text)
    lengths = ["short", "medium", "long", "short"] * 3
    every = [record_v2(number, length) for number, length in enumerate(lengths)]
    (tmp_path / "data.json").write_text(json.dumps(every, indent=1))
    return tmp_path


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_subset_has_its_published_tokens_and_metric(folder, name):
    for case in longbench(name, Random(1), 8, Reading(words, folder)):
        assert (case.max_tokens, case.match) == PUBLISHED[name]
        assert score(case, case.answer[-1]) == 1
        assert score(case, "") == 0
        few_shot = name in ("trec", "triviaqa", "samsum", "lcc", "repobench-p")
        assert case.form == ("plain" if few_shot else "chat")


def test_every_subset_is_there():
    assert set(SUBSETS) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_prompt_is_the_whole_context_and_then_the_question(folder, name):
    cases = longbench(name, Random(1), 8, Reading(words, folder))
    numbers = sorted(int(re.search(r"w(\d)\.0 ", case.prompt)[1]) for case in cases)
    assert numbers == list(range(8))
    for case in cases:
        number = int(re.search(r"w(\d)\.0 ", case.prompt)[1])
        asked = record(name, number)
        assert asked["context"] in case.prompt
        question = case.prompt[-case.question_characters :] if case.question_characters else ""
        assert asked["input"] in question and "w" + f"{number}." not in question
        assert "{input}" not in case.prompt


def test_v2_is_told_by_length_and_asks_for_a_letter(folder):
    for length, n in (("short", 6), ("medium", 3), ("long", 3)):
        cases = longbench_v2(length, Random(1), 100, Reading(words, folder))
        assert len(cases) == n
        for case in cases:
            number = int(re.search(r"Which one is (\d+)\?", case.prompt)[1])
            wanted = record_v2(number, length)
            question = case.prompt[-case.question_characters :]
            assert case.answer == (wanted["answer"],)
            assert f"({case.answer[0]}) {wanted[f'choice_{case.answer[0]}']}" in question
            assert wanted["context"] in case.prompt and wanted["context"] not in question
            assert score(case, f"The answer is ({wanted['answer']}).") == 1
            assert case.task == f"longbench-v2-{length}"


def test_a_context_too_long_loses_its_middle_and_nothing_else(folder):
    reading = Reading(words, folder, model_tokens=32 + TEMPLATE_TOKENS + 150)
    whole = longbench("hotpotqa", Random(1), 3, Reading(words, folder))
    for cut, full in zip(longbench("hotpotqa", Random(1), 3, reading), whole, strict=True):
        assert 0.98 * 150 <= words(cut.prompt) <= 150 < words(full.prompt)
        question = full.prompt[-full.question_characters :]
        assert cut.prompt.endswith(question)
        head, tail = cut.prompt[:300], cut.prompt[-300 - len(question) :]
        assert full.prompt.startswith(head) and full.prompt.endswith(tail)
    fits = Reading(words, folder, model_tokens=10_000)
    assert longbench("hotpotqa", Random(1), 3, fits) == whole


def test_a_question_that_does_not_fit_the_model_is_refused(folder):
    with pytest.raises(ValueError, match="tokens are needed"):
        longbench("hotpotqa", Random(1), 1, Reading(words, folder, model_tokens=100))


@pytest.mark.parametrize(
    ("n", "both"), [(0, ""), (1, "a"), (3, "abf"), (6, "abcdef"), (9, "abcdef")]
)
def test_both_ends_of_a_text(n, both):
    assert both_ends("abcdef", n) == both


def test_the_seed_chooses_and_a_larger_number_adds(folder):
    few, more, other = (
        longbench("qasper", Random(seed), n, Reading(words, folder))
        for seed, n in ((1, 3), (1, 5), (2, 3))
    )
    assert more[:3] == few != other
    assert len({case.key for case in more}) == 5


def test_the_published_archive_is_read_as_it_is(tmp_path):
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data/qasper.jsonl", lines([record("qasper", 5)]))
    (case,) = longbench("qasper", Random(1), 9, Reading(words, tmp_path))
    assert "w5.299" in case.prompt
    with pytest.raises(ValueError, match=r"cannot read .*lcc\.jsonl"):
        longbench("lcc", Random(1), 9, Reading(words, tmp_path))


def test_a_record_without_an_answer_is_left_out(tmp_path):
    blank = record("qasper", 1) | {"answers": [" ", ""]}
    (tmp_path / "qasper.jsonl").write_text(lines([blank, record("qasper", 2)]))
    assert len(longbench("qasper", Random(1), 9, Reading(words, tmp_path))) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}\nnope\n", r"cannot read .*qasper\.jsonl: "),
        ("", r"cannot read .*qasper\.jsonl: it holds no record"),
        (lines([{"input": "x", "context": "y"}]), "qasper, record 1: answers: Field required"),
        (lines([record("qasper", 1) | {"answers": "x"}]), "qasper, record 1: answers: "),
    ],
)
def test_a_file_of_another_schema_is_refused_in_one_line(tmp_path, text, said):
    (tmp_path / "qasper.jsonl").write_text(text)
    with pytest.raises(ValueError, match=said) as raised:
        longbench("qasper", Random(1), 9, Reading(words, tmp_path))
    assert "\n" not in str(raised.value)


def test_a_folder_without_the_data_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"has neither qasper\.jsonl nor data\.zip"):
        longbench("qasper", Random(1), 9, Reading(words, tmp_path))
    with pytest.raises(ValueError, match=r"has neither data\.json nor data\.jsonl"):
        longbench_v2("short", Random(1), 9, Reading(words, tmp_path))


def test_without_a_network_one_line_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"cannot fetch data\.zip .*--longbench-path") as raised:
        longbench("qasper", Random(1), 9, Reading(words))
    assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match=r"cannot fetch data\.json .*--longbench-path"):
        longbench_v2("short", Random(1), 9, Reading(words))
