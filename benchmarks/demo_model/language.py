"""The synthetic language of the demo model: facts, songs and filler, and questions about them.

    The code of amber is river seven stone.        a fact; its value is three words or a number
    Song: wolf lamp ... (14 words) ... rope.       a song
    Day long time has many opal they.              filler: Zipf words, a few stray keys and values

    What is the code of amber?                     -> river seven stone.
    Continue: wolf lamp owl kite                   -> the other ten words of the song, and a stop

Everything is built from *pieces*: strings that are exactly one token each, so a prompt has an
exact length in tokens without loading a tokenizer. Only the standard library is imported, and all
randomness comes from the ``random.Random`` that the caller passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from random import Random
from typing import Literal

from .words import CONTENT, FILLER, KEYS, VALUES

BEGIN, END = "<|begin|>", "<|end|>"
USER, ASSISTANT = "<|user|>", "<|assistant|>"
CHAT_TOKENS = 3  # what the chat template adds to one user turn: begin, user, assistant
SONG_WORDS, SONG_HINT_WORDS = 14, 4
MAX_FACTS = 64

Form = Literal["chat", "plain"]
ValueKind = Literal["words", "number"]
Pieces = list[str]

_ZIPF = list(accumulate(1 / (rank + 3) for rank in range(len(FILLER))))
_STRAY_RATE = 0.03
_NOISE_RATE = 0.004
_NOISE = list("!#$%&()*+,-/;=@[]^_{}~0123456789")


@dataclass(frozen=True)
class Task:
    """One question about one haystack, and the answer that a perfect reader gives.

    ``form`` says how to send the prompt: ``chat`` is the content of a user turn, ``plain`` a text
    to be completed. The model's text starts with a space: compare ``text.strip()`` with ``answer``.
    """

    prompt: str
    answer: str
    task: str
    length_tokens: int  # of the prompt, without the special tokens
    depth: float | None  # 0: the fact opens the prompt, 1: it stands right before the question
    n_facts: int
    form: Form


def needle_task(
    rng: Random,
    n_tokens: int,
    depth: float,
    *,
    form: Form = "chat",
    value: ValueKind = "words",
) -> Task:
    """One fact at ``depth`` of a prompt of exactly ``n_tokens``, asked for at the end."""
    fact = _Fact(rng.choice(KEYS), _value(rng, value))
    return _ask(rng, "needle", [fact.statement()], fact, n_tokens, depth, form)


def many_facts_task(
    rng: Random,
    n_tokens: int,
    n_facts: int,
    *,
    form: Form = "chat",
    value: ValueKind = "words",
) -> Task:
    """``n_facts`` facts scattered over the prompt; one of them is asked for."""
    if not 1 <= n_facts <= MAX_FACTS:
        raise ValueError(f"n_facts is {n_facts}: choose 1 to {MAX_FACTS}")
    facts = [_Fact(key, _value(rng, value)) for key in rng.sample(KEYS, n_facts)]
    statements = [fact.statement() for fact in facts]
    return _ask(rng, "many_facts", statements, rng.choice(facts), n_tokens, None, form)


def span_task(rng: Random, n_tokens: int, depth: float, *, form: Form = "chat") -> Task:
    """A song at ``depth``; the end gives its first four words and asks for the other ten."""
    song = _Song(rng.sample(CONTENT, SONG_WORDS))
    return _ask(rng, "span", [song.statement()], song, n_tokens, depth, form)


@dataclass(frozen=True)
class Mix:
    """What a curriculum phase puts into its training rows."""

    filler_share: tuple[float, float]
    facts: tuple[int, int]  # drawn log-uniformly; fewer where the row has no room
    max_questions: int
    song_rate: float = 0.25
    number_rate: float = 0.1
    chat_rate: float = 0.65
    recital_rate: float = 0.0  # rows that are one list of words said twice


@dataclass(frozen=True)
class Row:
    """A training row: its pieces, and for each whether it belongs to an answer."""

    pieces: Pieces
    is_answer: list[bool]
    first_question: int


def training_row(rng: Random, n_tokens: int, mix: Mix) -> Row:
    """A row of exactly ``n_tokens``: a haystack, then several questions about it."""
    if rng.random() < mix.recital_rate:
        return _recital(rng, n_tokens)
    form: Form = "chat" if rng.random() < mix.chat_rate else "plain"
    newline_rate = rng.choice((0.0, 0.0, 0.0, 0.1, 1.0))
    opening = [BEGIN, USER] if form == "chat" else [BEGIN]
    room = n_tokens - len(opening)
    budget = room * (1 - rng.uniform(*mix.filler_share))
    low, high = mix.facts
    wanted_facts = round(low * (high / low) ** rng.random())
    wanted_questions = rng.randint(max(1, mix.max_questions // 4), mix.max_questions)

    statements: list[Pieces] = []
    turns: list[tuple[Pieces, Pieces]] = []
    used = 0
    for item in _items(rng, wanted_facts, mix):
        statement = _on_line(rng, item.statement(), newline_rate)
        question, answer = item.question(form)
        question = _on_line(rng, question, newline_rate / 2)
        asked = len(turns) < wanted_questions
        cost = len(statement) + asked * (len(question) + len(answer) + 2)
        if (statements and used + cost > budget) or used + cost > room:
            break
        used += cost
        statements.append(statement)
        if asked:
            turns.append((question, answer))
    rng.shuffle(turns)

    asked_pieces: Pieces = []
    is_answer: list[bool] = []
    for question, answer in turns:
        if asked_pieces and form == "chat":
            asked_pieces.append(USER)
        asked_pieces += [*question, *answer, END]
        is_answer += [False] * (len(asked_pieces) - len(is_answer) - len(answer) - 1)
        is_answer += [True] * (len(answer) + 1)
    n_filler = room - sum(map(len, statements)) - len(asked_pieces)
    sentences = statements + _filler(rng, n_filler, newline_rate)
    rng.shuffle(sentences)
    haystack = [*opening, *chain.from_iterable(sentences)]
    return Row(haystack + asked_pieces, [False] * len(haystack) + is_answer, len(haystack))


def _recital(rng: Random, n_tokens: int) -> Row:
    """Distinct words, then the same words again: what makes copying appear early in training."""
    n_words = min((n_tokens - 1) // 2, len(CONTENT))
    words = [" " + word for word in rng.sample(CONTENT, n_words)]
    pieces = [BEGIN, *words, *words]
    is_answer = [False] * (n_words + 2) + [True] * (n_words - 1)
    rest = n_tokens - len(pieces)
    return Row(pieces + ["."] * rest, is_answer + [False] * rest, n_words + 1)


@dataclass(frozen=True)
class _Fact:
    key: str
    value: Pieces

    def statement(self) -> Pieces:
        return [" The", " code", " of", f" {self.key} is", *self.value, "."]

    def question(self, form: Form) -> tuple[Pieces, Pieces]:
        answer = [*self.value, "."]
        if form == "plain":
            return [" The", " code", " of", f" {self.key} is"], answer
        return [" What", " is", " the", " code", " of", f" {self.key}?", ASSISTANT], answer


@dataclass(frozen=True)
class _Song:
    words: list[str]

    def statement(self) -> Pieces:
        return [" Song:", *(" " + word for word in self.words), "."]

    def question(self, form: Form) -> tuple[Pieces, Pieces]:
        pieces = [" " + word for word in self.words]
        hint, answer = pieces[:SONG_HINT_WORDS], [*pieces[SONG_HINT_WORDS:], "."]
        return [" Continue:", *hint, *([ASSISTANT] if form == "chat" else [])], answer


def _items(rng: Random, wanted_facts: int, mix: Mix) -> list[_Fact | _Song]:
    """Facts with distinct keys, and now and then one or two songs, in random order."""
    items: list[_Fact | _Song] = []
    for key in rng.sample(KEYS, wanted_facts):
        kind: ValueKind = "number" if rng.random() < mix.number_rate else "words"
        items.append(_Fact(key, _value(rng, kind)))
    if rng.random() < mix.song_rate:
        items += [_Song(rng.sample(CONTENT, SONG_WORDS)) for _ in range(rng.randint(1, 2))]
    rng.shuffle(items)
    return items


def _ask(
    rng: Random,
    task: str,
    statements: Sequence[Pieces],
    asked: _Fact | _Song,
    n_tokens: int,
    depth: float | None,
    form: Form,
) -> Task:
    """Put the statements into filler so that haystack and question have ``n_tokens`` together."""
    question, answer = asked.question(form)
    if form == "chat":
        question = question[:-1]  # the assistant token comes from the chat template
    n_filler = n_tokens - sum(map(len, statements)) - len(question)
    if n_filler < 0:
        raise ValueError(
            f"a {task} prompt with {len(statements)} statement(s) has at least "
            f"{n_tokens - n_filler} tokens: n_tokens is {n_tokens}"
        )
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth is {depth}: choose 0 (first) to 1 (right before the question)")
    sentences = _filler(rng, n_filler, 0.0)
    for statement in statements:
        where = rng.random() if depth is None else depth
        sentences.insert(_boundary_at(sentences, where), statement)
    pieces = [*chain.from_iterable(sentences), *question]
    return Task(
        prompt="".join(pieces).lstrip(" "),
        answer="".join(answer).strip(),
        task=task,
        length_tokens=len(pieces),
        depth=depth,
        n_facts=len(statements),
        form=form,
    )


def _boundary_at(sentences: Sequence[Pieces], depth: float) -> int:
    """The sentence boundary nearest to ``depth`` times the tokens of all sentences."""
    ends = [0, *accumulate(map(len, sentences))]
    return min(range(len(ends)), key=lambda i: abs(ends[i] - depth * ends[-1]))


def _filler(rng: Random, n_tokens: int, newline_rate: float) -> list[Pieces]:
    """Sentences of together ``n_tokens`` pieces."""
    sentences = []
    while n_tokens > 0:
        size = min(rng.randint(5, 13), n_tokens)
        size = n_tokens if n_tokens - size < 4 else size
        on_line = size > 4 and rng.random() < newline_rate
        words = rng.choices(FILLER, cum_weights=_ZIPF, k=max(1, size - 1 - on_line))
        pieces = [_stray(rng) or " " + word for word in words]
        pieces[0] = " " + words[0].capitalize()
        pieces += ["."] * (size > 1)
        sentences.append(_start_line(pieces) if on_line else pieces)
        n_tokens -= size
    return sentences


def _stray(rng: Random) -> str | None:
    draw = rng.random()
    if draw < _NOISE_RATE:
        return rng.choice(_NOISE)
    return " " + rng.choice(CONTENT) if draw < _NOISE_RATE + _STRAY_RATE else None


def _on_line(rng: Random, pieces: Pieces, rate: float) -> Pieces:
    return _start_line(pieces) if rng.random() < rate else pieces


def _start_line(pieces: Pieces) -> Pieces:
    return ["\n", pieces[0].lstrip(" "), *pieces[1:]]


def _number(number: int) -> Pieces:
    first, *others = str(number)
    return [" " + first, *others]


_VALUE_MAKERS: dict[str, Callable[[Random], Pieces]] = {
    "words": lambda rng: [" " + word for word in rng.sample(VALUES, 3)],
    "number": lambda rng: _number(rng.randrange(100, 100_000)),
}


def _value(rng: Random, kind: ValueKind) -> Pieces:
    if kind not in _VALUE_MAKERS:
        raise ValueError(f"value is {kind!r}: choose one of {', '.join(_VALUE_MAKERS)}")
    return _VALUE_MAKERS[kind](rng)
