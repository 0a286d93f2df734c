"""RULER's synthetic tasks (Hsieh et al. 2024, arXiv 2404.06654), in words and texts of our own.

What is asked, in what haystack, and how many answers there are is as published, and so is the
score: the share of the answers that the text contains.
"""

import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from random import Random
from string import ascii_lowercase, ascii_uppercase
from typing import Literal

from vllm_kvcompress.bench.quality.case import Case
from vllm_kvcompress.bench.quality.prose import (
    Units,
    compounds,
    essay,
    insert_at,
    largest_that_fits,
)

Count = Callable[[str], int]

NOISE = ("Rain falls on the roof.", "The clock ticks on.", "A door opens.", "Nobody comes in.")
CHAIN_HOPS = 4
COMMON_WORDS = 10
FREQUENCIES = ((30, 3), (10, 1), (5, 1))  # of common and of other words; the first that fits
CODED_LETTERS = 6
ZIPF_EXPONENT = 2.0
FEWEST_CODED_WORDS = 80  # from here on the third and fourth most frequent differ


@dataclass(frozen=True)
class Niah:
    """Needles in a haystack.

    facts: how many keys the haystack mentions, where it is not made of needles itself.
    values: how many each has.
    asked: how many keys are asked for.
    """

    about: str
    haystack: Literal["noise", "essay", "needles"]
    key: Literal["words", "uuids"] = "words"
    value: Literal["numbers", "uuids"] = "numbers"
    facts: int = 1
    values: int = 1
    asked: int = 1


NIAH = {
    "niah_single_1": Niah("one number in repeated sentences", "noise"),
    "niah_single_2": Niah("one number in an essay", "essay"),
    "niah_single_3": Niah("one UUID in an essay", "essay", value="uuids"),
    "niah_multikey_1": Niah("one of four numbers in an essay", "essay", facts=4),
    "niah_multikey_2": Niah("one number among nothing but others", "needles"),
    "niah_multikey_3": Niah("one UUID among nothing but others", "needles", "uuids", "uuids"),
    "niah_multivalue": Niah("the four numbers of one key in an essay", "essay", values=4),
    "niah_multiquery": Niah("four numbers of four keys in an essay", "essay", facts=4, asked=4),
}


def niah(name: str, rng: Random, length: int, count: Count, depth: float | None = None) -> Case:
    """A case of one of the eight tasks of `NIAH`.

    Args:
        length: tokens of the prompt as `count` sees them; it has up to about 2 % fewer.
        depth: where the fact stands that is asked for, when it is one; None for anywhere.

    Raises:
        ValueError: the length is too short.
    """
    task = NIAH[name]
    kind = "number" if task.value == "numbers" else "code"
    keys = _SOURCES[task.key](_split(rng))
    values = _SOURCES[task.value](_split(rng))

    def statement(key: str, value: str) -> str:
        return f"The secret {kind} of {key} is {value}. "

    known = list(islice(keys, task.facts))
    facts = [(key, next(values)) for key in known * task.values]
    depths = [rng.random() for _ in facts]
    asked = known[: task.asked]
    several = task.asked > 1 or task.values > 1
    if depth is not None and not several:
        depths[0] = depth
    if task.haystack == "needles":
        units = Units(map(statement, keys, values))
    else:
        units = Units(essay(_split(rng)) if task.haystack == "essay" else noise())

    opening = (
        f"The text below hides one or more secret {kind}s. Remember them: "
        "at the end you are asked about them.\n\n"
    )
    wanted = f"are all the secret {kind}s" if several else f"is the secret {kind}"
    question = f"\n\nWhat {wanted} of {_listed(asked)} that the text above mentions?"
    needles = [(at, statement(*fact)) for at, fact in zip(depths, facts, strict=True)]

    def build(size: int) -> str:
        return opening + insert_at(units.first(size), needles) + question

    return Case(
        prompt=largest_that_fits(build, 1, length, count),
        answer=tuple(value for key, value in facts if key in asked),
        task=name,
        length=length,
        depth=None if several else depths[0],
        max_tokens=128,
        match="contains-all",
        question_characters=len(question),
    )


def variable_tracking(rng: Random, length: int, count: Count) -> Case:
    """Which five variables hold a number, the later ones by assignment from one another."""
    names = _strings(rng, ascii_uppercase, 5, 2 * (CHAIN_HOPS + 1))
    shown, asked = names[: CHAIN_HOPS + 1], names[CHAIN_HOPS + 1 :]
    shown_value, value = rng.sample(range(10_000, 100_000), 2)
    depths = [sorted(rng.random() for _ in range(CHAIN_HOPS + 1)) for _ in range(2)]

    def chain(size: int, variables: list[str], first: int, depths: list[float]) -> str:
        sources = [str(first), *(f"VAR {variable}" for variable in variables)]
        needles = [
            (depth, f"VAR {variable} = {source}. ")
            for depth, variable, source in zip(depths, variables, sources, strict=False)
        ]
        return insert_at(list(islice(noise(), size)), needles)

    def ask(number: int) -> str:
        return (
            f"\n\nWhich {CHAIN_HOPS + 1} variables hold the value {number}, directly or by "
            "assignment from one another? Answer with their names only."
        )

    opening = "Follow the assignments of variables that are hidden in the text below.\n\n"
    example = chain(5, shown, shown_value, depths[0])
    start = f"{opening}{example}{ask(shown_value)}\n{', '.join(shown)}\n\n{opening}"

    def build(size: int) -> str:
        return start + chain(size, asked, value, depths[1]) + ask(value)

    return Case(
        prompt=largest_that_fits(build, 1, length, count),
        answer=tuple(asked),
        task="vt",
        length=length,
        max_tokens=64,
        match="contains-all",
        question_characters=len(ask(value)),
    )


def common_words(rng: Random, length: int, count: Count) -> Case:
    """Which ten words of a long list stand in it most often."""
    shuffles = rng.random()
    source = compounds(_split(rng))
    shown = list(islice(source, 2 * COMMON_WORDS))
    words = Units(source)

    def listed(words: list[str], common: int, other: int) -> str:
        items = words[:COMMON_WORDS] * common + words[COMMON_WORDS:] * other
        Random(shuffles).shuffle(items)
        return " ".join(f"{i}. {word}" for i, word in enumerate(items, 1))

    opening = "Remember which words appear most often in the numbered list below.\n\n"
    question = (
        f"\n\nWhich {COMMON_WORDS} words appear most often in the list above? "
        "Answer with the words only."
    )
    answered = " ".join(shown[:COMMON_WORDS])
    start = f"{opening}{listed(shown, 3, 1)}{question}\n{answered}\n\n{opening}"

    def build(size: int, common: int, other: int) -> str:
        return start + listed(words.first(COMMON_WORDS + size), common, other) + question

    fit = (pair for pair in FREQUENCIES if count(build(COMMON_WORDS, *pair)) <= length)
    common, other = next(fit, FREQUENCIES[-1])
    return Case(
        prompt=largest_that_fits(lambda n: build(n, common, other), COMMON_WORDS, length, count),
        answer=tuple(words.first(COMMON_WORDS)),
        task="cwe",
        length=length,
        max_tokens=120,
        match="contains-all",
        question_characters=len(question),
    )


def frequent_words(rng: Random, length: int, count: Count) -> Case:
    """Which three words of a coded text are the most frequent, dots aside; counts follow Zipf."""
    coded = _strings(_split(rng), ascii_lowercase, CODED_LETTERS, max(8, length // 50))
    shuffles = rng.random()
    vocabulary = ["...", *coded]
    weights = [(rank + 1) ** -ZIPF_EXPONENT for rank in range(len(vocabulary))]
    opening = "Count how often each word appears in the coded text below. Ignore the dots.\n\n"
    question = (
        "\n\nWhich three words, not the dots, appear most often in the coded text above? "
        "Answer with the words only."
    )

    def build(size: int) -> str:
        shares = [int(size * weight / sum(weights)) for weight in weights]
        items = [w for w, n in zip(vocabulary, shares, strict=True) for _ in range(n)]
        Random(shuffles).shuffle(items)
        return f"{opening}{' '.join(items)}{question}"

    return Case(
        prompt=largest_that_fits(build, FEWEST_CODED_WORDS, length, count),
        answer=tuple(coded[:3]),
        task="fwe",
        length=length,
        max_tokens=50,
        match="contains-all",
        question_characters=len(question),
    )


def noise() -> Iterator[str]:
    return (sentence + " " for sentence in cycle(NOISE))


def _split(rng: Random) -> Random:
    """A generator of its own, so that how much is drawn from one changes no other."""
    return Random(rng.random())


def _numbers(rng: Random) -> Iterator[str]:
    while True:
        yield str(rng.randrange(10**6, 10**7))


def _uuids(rng: Random) -> Iterator[str]:
    while True:
        yield str(uuid.UUID(int=rng.getrandbits(128), version=4))


_SOURCES = {"words": compounds, "numbers": _numbers, "uuids": _uuids}


def _strings(rng: Random, letters: str, size: int, n: int) -> list[str]:
    """`n` different ones."""
    found: dict[str, None] = {}
    while len(found) < n:
        found["".join(rng.choices(letters, k=size))] = None
    return list(found)


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
