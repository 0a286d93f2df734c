"""Needle in a haystack over length and depth (Kamradt 2023), in plain English of our own."""

from collections.abc import Callable
from random import Random

from vllm_kvcompress.bench.quality.case import Case
from vllm_kvcompress.bench.quality.prose import (
    ADJECTIVES,
    NOUNS,
    Units,
    essay,
    insert_at,
    largest_that_fits,
)

Count = Callable[[str], int]

INSTRUCTION = "Read the text below; a question about it follows.\n\n"


def number_needle(rng: Random, length: int, depth: float | None, count: Count) -> Case:
    """A number of five digits that somebody painted on a door."""
    town, number = _town(rng), str(rng.randrange(10_000, 100_000))
    needle = f"The ferryman of {town} painted the number {number} on his door. "
    question = f"Which number did the ferryman of {town} paint on his door? Answer with it only."
    return _case("niah-number", rng, length, depth, count, needle, question, (number,))


def words_needle(rng: Random, length: int, depth: float | None, count: Count) -> Case:
    """The names of three cats; each is a third of the score."""
    town = _town(rng)
    cats = tuple(noun.capitalize() for noun in rng.sample(NOUNS, 3))
    needle = f"The widow of {town} called her cats {cats[0]}, {cats[1]} and {cats[2]}. "
    question = f"What did the widow of {town} call her three cats? Answer with their names only."
    return _case("niah-words", rng, length, depth, count, needle, question, cats)


def _case(
    task: str,
    rng: Random,
    length: int,
    depth: float | None,
    count: Count,
    needle: str,
    question: str,
    answers: tuple[str, ...],
) -> Case:
    """`needle` at `depth` of an essay, anywhere when that is None.

    The prompt has at most `length` tokens as `count` sees them, and up to about 2 % fewer.
    """
    sentences, anywhere = Units(essay(Random(rng.random()))), rng.random()
    at = anywhere if depth is None else depth
    question = f"\n\n{question}"

    def build(size: int) -> str:
        return INSTRUCTION + insert_at(sentences.first(size), [(at, needle)]) + question

    return Case(
        prompt=largest_that_fits(build, 1, length, count),
        answer=answers,
        task=task,
        length=length,
        depth=at,
        max_tokens=48,
        match="contains-all",
        question_characters=len(question),
    )


def _town(rng: Random) -> str:
    return f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}".title()
