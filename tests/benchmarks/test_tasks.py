import json
import re

import datasets
import pytest

from vllm_kvcompress.bench.demo_model.tokenizer import build_tokenizer
from vllm_kvcompress.bench.quality.tasks import GROUPS, find_tasks, make_cases, task_help

TOKENIZER = build_tokenizer()


def count(text):
    return len(TOKENIZER.encode(text, add_special_tokens=False).ids)


def made(names=("demo",), lengths=(256,), depths=(), n=3, seed=1):
    return make_cases(names, lengths, depths, n, seed, count)


def test_the_same_seed_makes_the_same_cases_and_another_seed_others():
    assert made() == made()
    assert not {case.key for case in made()} & {case.key for case in made(seed=2)}


def test_cases_depend_on_no_other_task_length_depth_or_number():
    alone = {case.key for case in made(["span"], [512], n=2)}
    among = {case.key for case in made(["demo", "needle-grid"], [256, 512], n=4)}
    assert alone < among
    mid = {case.key for case in made(["needle-grid"], depths=[0.5])}
    assert mid < {case.key for case in made(["needle-grid"], depths=[0.1, 0.5, 0.9])}


def test_there_are_n_cases_of_every_task_and_length_and_of_every_depth_in_a_grid():
    cases = made(["demo", "needle-grid"], [192, 256], depths=[0, 1], n=3)
    cells = [(case.task, case.length, case.depth) for case in cases]
    assert cells.count(("many-facts", 256, None)) == 3
    assert cells.count(("needle-grid", 192, 1)) == 3
    assert len(cells) == 3 * 3 * 2 + 3 * 2 * 2


def test_groups_and_tasks_are_found_once_each():
    assert list(find_tasks(["span", "demo", "span"])) == ["span", "needle", "many-facts"]


def test_an_unknown_task_is_answered_with_those_there_are():
    with pytest.raises(ValueError, match=r"no task 'neddle': the tasks are needle, .*groups demo"):
        made(["neddle"])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"n": 0}, "n is 0"),
        ({"n": 10**9}, "choose 1 to 100,000 cases"),
        ({"lengths": [0]}, "a length is 0"),
        ({"lengths": [10**12]}, "a length is"),
        ({"depths": [1.5]}, "a depth is 1.5"),
        ({"depths": [float("nan")]}, "a depth is nan"),
        ({"names": ["many-facts"], "lengths": [8]}, "many-facts 8: a many_facts prompt"),
    ],
)
def test_numbers_out_of_bounds_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        made(**wrong)


def test_help_names_every_task_and_group():
    said = task_help()
    for group, tasks in GROUPS.items():
        for name in (group, *tasks):
            assert re.search(rf"^[* ]*{re.escape(name)}[*]*: \w", said, re.MULTILINE)


@pytest.mark.parametrize("length", [192, 1024])
def test_demo_cases_have_their_length_and_room_for_the_answer(length):
    for case in made(["demo", "demo-grid"], [length]):
        assert count(case.prompt) == count(" " + case.prompt) == case.length == length
        assert case.max_tokens == count(" " + case.answer[0]) + 4


def test_the_answer_to_a_demo_question_stands_in_its_context():
    for case in made(["demo", "demo-grid"], n=20):
        cut = len(case.prompt) - case.question_characters
        context, question = case.prompt[:cut], case.prompt[cut:]
        if song := re.fullmatch(r" Continue:((?: [a-z]+){4})", question):
            assert f"Song:{song[1]} {case.answer[0]}" in context
        else:
            key = re.fullmatch(r" What is the code of ([a-z]+)\?", question)[1]
            assert f"The code of {key} is {case.answer[0]}" in context


def test_grid_needles_stand_at_their_depth():
    for case in made(["needle-grid"], [1024], n=10):
        cut = len(case.prompt) - case.question_characters
        start = case.prompt[:cut].index(case.answer[0])
        assert abs(count(case.prompt[:start]) / count(case.prompt[:cut]) - case.depth) < 0.03


def words(text):
    return len(re.findall(r"\w+|[^\w\s]", text))


@pytest.mark.parametrize("group", ["niah", "ruler"])
def test_tasks_in_english_have_their_name_and_length(group):
    cases = make_cases([group], [2000], [0.5], 1, 1, words)
    assert [case.task for case in cases] == list(GROUPS[group])
    assert all(0.95 * 2000 <= words(case.prompt) <= 2000 == case.length for case in cases)
    assert all(case.question_characters < len(case.prompt) / 4 for case in cases)


def test_a_length_too_short_is_refused_with_the_name_of_the_task():
    with pytest.raises(ValueError, match=r"cwe 100: at least [\d,]+ tokens are needed"):
        make_cases(["cwe"], [100], [], 1, 1, words)


def test_data_sets_are_read_from_a_folder_and_cut_to_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    record = {"input": "Who?", "context": "word " * 500, "answers": ["Amber"]}
    (tmp_path / "qasper.jsonl").write_text(json.dumps(record) + "\n")
    (case,) = make_cases(["qasper"], [], [], 5, 1, words, longbench_path=tmp_path, model_tokens=400)
    assert case.task == "qasper" and case.length is None
    assert words(case.prompt) + case.max_tokens <= 400


def test_names_of_tasks_and_groups_are_told_apart():
    names = [name for tasks in GROUPS.values() for name in tasks]
    assert len(set(names)) == len(names)
    assert not set(names) & set(GROUPS)
