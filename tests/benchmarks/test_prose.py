import re
from itertools import islice, permutations
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvcompress.bench.quality.prose import (
    ADJECTIVES,
    NOUNS,
    Units,
    compounds,
    essay,
    insert_at,
    largest_that_fits,
)


def test_no_key_stands_inside_another():
    assert not [pair for pair in permutations(ADJECTIVES, 2) if pair[1].endswith(pair[0])]
    assert not [pair for pair in permutations(NOUNS, 2) if pair[1].startswith(pair[0])]


def test_keys_differ_until_there_are_no_more():
    keys = compounds(Random(1))
    found = list(islice(keys, len(ADJECTIVES) * len(NOUNS)))
    assert len(set(found)) == len(found)
    with pytest.raises(ValueError, match="choose a shorter length"):
        next(keys)


def test_an_essay_is_varied_sentences_without_digits_or_keys():
    sentences = list(islice(essay(Random(1)), 2000))
    assert len(set(sentences)) > 1950
    for sentence in sentences:
        assert re.fullmatch(r"[A-Z][a-z]*( [a-z]+,?)+\.\s+", sentence.replace(", ", " ")), sentence
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", sentence)


def test_a_text_that_grows_keeps_its_beginning():
    units = Units(essay(Random(1)))
    first = units.first(5)
    assert units.first(50)[:5] == first == units.first(5)
    assert len(units.first(50)) == 50


def test_needles_stand_at_the_boundary_nearest_to_their_depth():
    units = ["aaaa ", "bb ", "cc "]  # boundaries at 0, 5/11, 8/11 and 1
    needles = [(0.0, "X "), (0.5, "Y "), (0.52, "Z "), (0.7, "V "), (1.0, "W ")]
    assert insert_at(units, needles) == "X aaaa Y Z bb V cc W"


@given(
    base=st.integers(1, 300),
    sizes=st.lists(st.integers(1, 90), min_size=1, max_size=5),
    tokens=st.integers(1, 20_000),
)
def test_the_largest_text_that_fits_is_found(base, sizes, tokens):
    """With units of uneven size, against a search by trying all."""
    calls = 0

    def count(text):
        nonlocal calls
        calls += 1
        return base + sum(sizes[i % len(sizes)] for i in range(len(text)))

    if base + sizes[0] > tokens:
        with pytest.raises(ValueError, match="tokens are needed"):
            largest_that_fits(lambda n: "x" * n, 1, tokens, count)
        return
    found = largest_that_fits(lambda n: "x" * n, 1, tokens, count)
    assert calls < 40
    assert count(found) <= tokens
    assert count(found) >= 0.99 * tokens or count(found + "x") > tokens
