import json
import re
from pathlib import Path

import pytest

from vllm_kvcompress.bench.quality import prompts_file
from vllm_kvcompress.bench.quality.case import Case
from vllm_kvcompress.bench.quality.prompts_file import BadLine, read_prompts

GOOD = {"prompt": "What is two and two?", "answer": "four"}


@pytest.fixture
def read(tmp_path):
    def read(*lines):
        path = tmp_path / "prompts.jsonl"
        path.write_bytes(b"\n".join(x if isinstance(x, bytes) else x.encode() for x in lines))
        return read_prompts(path)

    return read


def reason(read, line):
    """Why `line` is bad, when it stands between two good ones, which still run."""
    good = json.dumps(GOOD)
    cases, bad = read(good, line, good)
    assert cases == [Case(**GOOD)] * 2
    assert [each.number for each in bad] == [2]
    assert "\n" not in bad[0].reason
    return bad[0].reason


def test_every_field_of_a_case_is_read(read):
    full = {
        "prompt": "Zwei und zwei? ☃",
        "answer": ["vier", "4"],
        "task": "sums",
        "length": 12,
        "depth": 0,
        "max_tokens": 8,
        "match": "contains",
        "form": "plain",
        "question_characters": 3,
    }
    assert read(json.dumps(full), json.dumps(full, ensure_ascii=False)) == ([Case(**full)] * 2, [])
    assert set(full) == set(Case.model_fields)


def test_a_prompt_and_an_answer_are_enough(read):
    cases, bad = read(json.dumps(GOOD))
    assert bad == []
    assert (cases[0].answer, cases[0].match, cases[0].max_tokens) == (("four",), "exact", None)


def test_empty_lines_windows_line_ends_and_a_byte_order_mark_are_passed_over(read):
    good = json.dumps(GOOD).encode()
    cases, bad = read(b"\xef\xbb\xbf" + good + b"\r", b"", b"  \t", good + b"\r", b"")
    assert (len(cases), bad) == (2, [])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not JSON: EOF while parsing an object at column 1"),
        ("prompt: x", "not JSON"),
        ('{"prompt": "x", "answer": "y"} and more', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('["x", "y"]', "not a JSON object"),
        ("7", "not a JSON object"),
        (b'{"prompt": "\xff", "answer": "y"}', "not UTF-8 at byte 13"),
        ('{"prompt": "\\ud800", "answer": "y"}', "not JSON"),
        ('{"answer": "y"}', "no 'prompt'"),
        ('{"prompt": "x"}', "no 'answer'"),
        ("{}", "no 'prompt'; no 'answer'"),
    ],
)
def test_what_is_no_object_of_a_prompt_and_an_answer_is_a_bad_line(read, line, said):
    assert reason(read, line).startswith(said)


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ({"promt": "x"}, "unknown key 'promt': the keys are prompt, answer"),
        ({"prompt": 7}, "prompt: "),
        ({"prompt": ""}, "prompt: "),
        ({"answer": 4}, "answer: must be a string or a list of strings"),
        ({"answer": [4]}, "answer: must be a string or a list of strings"),
        ({"answer": None}, "answer: must be a string or a list of strings"),
        ({"answer": []}, "answer: there is none"),
        ({"answer": ["four", ""]}, "answer: "),
        ({"length": "12"}, "length: "),
        ({"length": 0}, "length: "),
        ({"length": True}, "length: "),
        ({"depth": float("nan")}, "not JSON"),
        ({"depth": 1.5}, "depth: "),
        ({"max_tokens": 0}, "max_tokens: "),
        ({"max_tokens": 10**30}, "max_tokens: "),
        ({"max_tokens": 2.5}, "max_tokens: "),
        ({"match": "regex"}, "match: "),
        ({"form": "Chat"}, "form: "),
        ({"task": ["a"]}, "task: "),
        ({"question_characters": 20}, "question_characters: 20 leave no context"),
    ],
)
def test_a_wrong_value_is_a_bad_line_that_names_the_field(read, field, said):
    assert reason(read, json.dumps(GOOD | field)).startswith(said)


def test_a_line_too_long_is_skipped_and_not_kept(read, monkeypatch):
    monkeypatch.setattr(prompts_file, "MAX_LINE_BYTES", 2**10)
    huge = json.dumps(GOOD | {"prompt": "x" * 10_000})
    assert "longer than" in reason(read, huge)
    fits = json.dumps(GOOD)
    fits += " " * (2**10 - 1 - len(fits))
    assert read(fits, fits)[1] == []
    assert read(huge)[1] == [BadLine(1, reason(read, huge))]


def test_a_file_of_another_kind_is_refused_in_one_line(read, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"more than 1,000 bad lines, the first on line 1: not JS"):
        read(*["not a prompt"] * 1001)
    with pytest.raises(ValueError, match=r"cannot read .*: No such file or directory"):
        read_prompts(tmp_path / "nothing.jsonl")
    with pytest.raises(ValueError, match=r"cannot read .*: Is a directory"):
        read_prompts(tmp_path)
    monkeypatch.setattr(prompts_file, "MAX_FILE_BYTES", 200)
    with pytest.raises(ValueError, match="larger than"):
        read(*[json.dumps(GOOD)] * 10)
    monkeypatch.setattr(prompts_file, "MAX_CASES", 1)
    with pytest.raises(ValueError, match="more than 1 cases"):
        read(*[json.dumps(GOOD)] * 2)


def test_the_lines_in_the_documentation_are_cases(read):
    page = Path(__file__).parents[2] / "docs" / "quality-tasks.md"
    (shown,) = re.findall(r"```json\n(.*?)```", page.read_text(), re.DOTALL)
    cases, bad = read(*shown.splitlines())
    assert len(cases) == 2 and not bad
    assert set(re.findall(r"`(\w+)`", page.read_text())) >= set(Case.model_fields)
