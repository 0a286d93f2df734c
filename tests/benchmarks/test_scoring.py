"""Scores against numbers worked out by hand or printed in the papers that define them."""

import pytest

from vllm_kvcompress.bench.quality.case import Case
from vllm_kvcompress.bench.quality.scoring import METRICS, chosen_letter, score


def scored(match, answer, text, **fields):
    return score(Case(prompt="?", answer=answer, match=match, **fields), text)


def test_every_match_of_a_case_has_a_metric():
    assert set(METRICS) == set(Case.model_fields["match"].annotation.__args__)


@pytest.mark.parametrize(
    ("text", "right"),
    [(" river  seven\nstone. ", 1), ("river seven", 0), ("River seven stone.", 0), ("", 0)],
)
def test_exact_looks_past_white_space_only(text, right):
    assert scored("exact", "river seven stone.", text) == right


def test_any_of_several_answers_is_right():
    assert scored("exact", ["four", "4"], "4") == 1
    assert scored("contains", ["four", "4"], "It is Four, I think") == 1
    assert scored("contains", ["four", "4"], "It is five") == 0


def test_contains_all_is_the_share_found():
    wanted = ["Amber", "birch", "cedar", "daisy"]
    assert scored("contains-all", wanted, "amber, daisy and\ncedar") == 0.75
    assert scored("contains-all", wanted, "none") == 0


@pytest.mark.parametrize(
    ("said", "rouge_l"),
    [("police kill the gunman", 0.75), ("the gunman kill police", 0.5), ("Nobody!", 0), ("", 0)],
)
def test_rouge_l_is_that_of_lin_2004(said, rouge_l):
    """Section 3.2 of "ROUGE": the reference is "police killed the gunman"."""
    assert scored("rouge", "police killed the gunman", said) == rouge_l


def test_rouge_l_weighs_precision_and_recall_alike():
    # The common subsequence is "cat sat mat": precision 3/4, recall 3/6.
    said = "Cat sat, mat: purring!"
    assert scored("rouge", "the cat sat on the mat", said) == pytest.approx(2 * 3 / (4 + 6))


def test_rouge_counts_chinese_by_character():
    assert scored("rouge", "我喜欢猫", "我喜欢狗") == 0.75


@pytest.mark.parametrize(
    ("answer", "text", "f"),
    [
        ("the Denver Broncos", "Denver Broncos.", 1),
        ("Denver Broncos", "It was the Broncos", 2 * 1 / (2 + 3)),
        ("cat cat dog", "cat dog dog", 2 / 3),
        ("Paris", "London", 0),
        ("Paris", "", 0),
    ],
)
def test_f1_counts_words_as_squad_does(answer, text, f):
    assert scored("f1", answer, text) == pytest.approx(f)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(C)", "C"),
        ("**D.** because of the date", "D"),
        ("The correct answer is (A).", "A"),
        ("The correct answer is: **B**", "B"),
        ("A reader might think so. Final answer: C", "C"),
        ("The answer is A, no: wait. The answer is D.", "D"),
        ("A careful reading shows nothing", None),
        ("I do not know", None),
        ("", None),
    ],
)
def test_the_chosen_letter_is_found(text, letter):
    assert chosen_letter(text) == letter
    assert scored("choice", "B", text) == (letter == "B")


def test_a_class_must_be_the_one_named():
    assert scored("choice", "Definition of something", " definition of something.\n") == 1
    assert scored("choice", "Definition of something", "Description of something") == 0
    assert scored("choice", "Individual", "Individual, title, group, other") == 0


def test_code_is_compared_on_its_first_line():
    text = "```python\n# next\n    return a + b\nprint(a)\n```"
    assert scored("code", "return a + b", text) == 1
    # One of 12 characters replaced: 11 + 11 of 12 + 12 are in common.
    assert scored("code", "return a + b", "return a - b") == pytest.approx(22 / 24)
    assert scored("code", "return a + b", "```\n```") == 0


@pytest.mark.parametrize(
    ("text", "share"),
    [("Paragraph 7", 1), ("7 or 12", 0.5), ("It is 17", 0), ("none", 0), ("9" * 5000, 0)],
)
def test_number_is_the_share_of_the_numbers_said(text, share):
    assert scored("number", "Paragraph 7", text) == share


def test_a_completed_text_is_judged_without_the_next_example():
    goes_on = " Paris\nQuestion: What is the capital of Italy?\nAnswer: Rome"
    assert scored("f1", "Paris", goes_on, form="plain") == 1
    assert scored("rouge", "Paris", goes_on, form="plain") == 1
    assert scored("choice", "Paris", goes_on, form="plain") == 1
    assert scored("f1", "Paris", goes_on) < 0.5
    two_lines = "Paris is\nin France"
    assert scored("rouge", two_lines, f"{two_lines}\nnot in Italy", form="plain") == 1
