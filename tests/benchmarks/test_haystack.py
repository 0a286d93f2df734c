"""Needles in an essay, found by readers that see nothing but the prompt."""

import re
from random import Random

import pytest

from vllm_kvcompress.bench.quality.haystack import number_needle, words_needle
from vllm_kvcompress.bench.quality.scoring import score

MAKERS = [number_needle, words_needle]


def count(text):
    """About what a trained tokenizer makes of English."""
    return len(re.findall(r"\w{1,4}|[^\w\s]|\n\n", text))


def parted(case):
    cut = len(case.prompt) - case.question_characters
    return case.prompt[:cut], case.prompt[cut:].strip()


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0, None])
def test_a_reader_of_the_prompt_finds_the_needle(make, depth):
    for seed in range(10):
        case = make(Random(seed), 2000, depth, count)
        context, question = parted(case)
        town = re.search(r" of ([A-Z]\w+ [A-Z]\w+)", question)[1]
        (sentence,) = [s for s in re.split(r"(?<=\.)\s", context) if town in s]
        said = re.findall(r"\d{5}|[A-Z][a-z]+", sentence.split(town)[1])
        assert tuple(said) == case.answer
        assert score(case, f"It says: {' and '.join(said)}.") == 1
        assert score(case, said[0]) == pytest.approx(1 / len(said))
        assert score(case, question) == 0


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("length", [1000, 12_000])
def test_prompts_have_their_length_within_two_percent_and_never_more(make, length):
    for depth in (0.0, 0.5, 1.0):
        case = make(Random(1), length, depth, count)
        assert 0.98 * length <= count(case.prompt) <= length == case.length


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("depth", [0.0, 0.25, 0.8, 1.0])
def test_the_needle_stands_at_its_depth(make, depth):
    case = make(Random(1), 6000, depth, count)
    haystack = parted(case)[0].split("\n\n", 1)[1]
    assert abs(haystack.index(case.answer[0]) / len(haystack) - depth) < 0.02


@pytest.mark.parametrize("make", MAKERS)
def test_depths_of_the_same_seed_differ_in_nothing_else(make):
    first, last = (parted(make(Random(1), 3000, depth, count)) for depth in (0.0, 1.0))
    assert first[1] == last[1]
    assert sorted(re.split(r"\s+", first[0])) == sorted(re.split(r"\s+", last[0]))


@pytest.mark.parametrize("make", MAKERS)
def test_a_length_too_short_is_refused_with_the_least_one(make):
    with pytest.raises(ValueError, match=r"at least \d+ tokens are needed"):
        make(Random(1), 20, 0.5, count)
