"""LongBench (Bai et al. 2023, arXiv 2308.14508) and LongBench-v2 (arXiv 2412.15204).

The data, the tokens an answer may have and the scores are the published ones; the instructions are
our own. What does not fit the model loses the middle of its context, as in the papers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal, TypeVar

from pydantic import BaseModel, ValidationError

from vllm_kvcompress.bench.quality.case import Case, Form, Match
from vllm_kvcompress.bench.quality.hub import load_longbench, load_longbench_v2
from vllm_kvcompress.bench.quality.prose import largest_that_fits

Count = Callable[[str], int]
Checked = TypeVar("Checked", bound=BaseModel)

LENGTHS_V2 = ("short", "medium", "long")
OPENING_V2 = "Read the text below; a question about it follows.\n\n"
QUESTION_V2 = """

Which of the four choices answers this question?
{question}
(A) {choice_A}
(B) {choice_B}
(C) {choice_C}
(D) {choice_D}

Say nothing but "The answer is (X)", with its letter."""
ANSWER_TOKENS_V2 = 128
TEMPLATE_TOKENS = 64  # kept free for what a chat template adds
MOST_CHARACTERS_A_TOKEN = 16


@dataclass(frozen=True)
class Subset:
    """A subset of LongBench.

    opening: what stands before the context.
    question: what stands behind it; `{input}` is the record's.
    form: `plain` where the context is examples or code to be gone on with.
    """

    about: str
    opening: str
    question: str
    answer_tokens: int
    match: Match
    form: Form = "chat"


def _documents(about: str, answer_tokens: int, context: str, hint: str = "") -> Subset:
    return Subset(
        about,
        f"Read the {context} below; a question about it follows.\n\n",
        f"\n\nAnswer this question in as few words as you can, without explaining. {hint}"
        "\nQuestion: {input}\nAnswer:",
        answer_tokens,
        "f1",
    )


def _summary(about: str, context: str, question: str) -> Subset:
    return Subset(about, f"Read the {context} below.\n\n", f"\n\n{question}", 512, "rouge")


UNANSWERABLE = "Say yes or no where that answers it, and unanswerable where the text does not."

SUBSETS = {
    "narrativeqa": _documents("questions about a book or film script", 128, "story"),
    "qasper": _documents("questions about a paper", 128, "paper", UNANSWERABLE),
    "multifieldqa_en": _documents("questions about one document", 64, "document"),
    "hotpotqa": _documents("questions over two of many passages", 32, "passages"),
    "2wikimqa": _documents("questions over several passages", 32, "passages"),
    "musique": _documents("questions of several steps over passages", 32, "passages"),
    "gov_report": _summary(
        "summary of a report", "report", "Write a summary of the report, about one page.\nSummary:"
    ),
    "qmsum": _summary(
        "summary of a meeting, as asked",
        "transcript of a meeting",
        "Answer in a few sentences what is asked about the meeting.\nTask: {input}\nAnswer:",
    ),
    "multi_news": _summary(
        "summary of several news texts",
        "news texts",
        "Write a summary of all the texts, about one page.\nSummary:",
    ),
    "trec": Subset(
        "the type of a question, by examples",
        "Each question below is followed by its type.\n\n",
        "\n{input}",
        64,
        "choice",
        "plain",
    ),
    "triviaqa": Subset(
        "trivia from a passage, by examples",
        "Each passage below is followed by a question about it and a short answer.\n\n",
        "\n\n{input}",
        32,
        "f1",
        "plain",
    ),
    "samsum": Subset(
        "summary of a chat, by examples",
        "Each dialogue below is followed by a short summary.\n\n",
        "\n\n{input}",
        128,
        "rouge",
        "plain",
    ),
    "passage_count": Subset(
        "how many of many passages differ",
        "Some of the passages below stand there more than once.\n\n",
        "\n\nHow many different passages are there? Answer with the number only.\nAnswer:",
        32,
        "number",
    ),
    "passage_retrieval_en": Subset(
        "which passage a summary is of",
        "Here are numbered paragraphs; a summary of one of them follows.\n\n",
        "\n\nSummary: {input}\n\nWhich paragraph is it of? Answer as in `Paragraph 1`.\nAnswer:",
        32,
        "number",
    ),
    "lcc": Subset("the next line of a file of code", "", "{input}", 64, "code", "plain"),
    "repobench-p": Subset(
        "the next line of code, with other files", "", "{input}", 64, "code", "plain"
    ),
}


class Record(BaseModel):
    """A line of LongBench."""

    context: str
    input: str
    answers: list[str]


class RecordV2(BaseModel):
    """An entry of LongBench-v2."""

    context: str
    question: str
    choice_A: str
    choice_B: str
    choice_C: str
    choice_D: str
    answer: Literal["A", "B", "C", "D"]


@dataclass(frozen=True)
class Reading:
    """Where the data lies and how much of it the model reads.

    folder: of LongBench it has `NAME.jsonl`, `data/NAME.jsonl` or `data.zip`, of LongBench-v2
        `data.json` or `data.jsonl`; None for the Hugging Face hub.
    model_tokens: what prompt and answer may have together; None for no limit.
    """

    count: Count
    folder: Path | None = None
    model_tokens: int | None = None

    def prompt(self, opening: str, context: str, question: str, answer_tokens: int) -> str:
        """All three; of the context only both ends where that is too much for the model."""
        if self.model_tokens is None:
            return opening + context + question
        most = max(1, self.model_tokens - answer_tokens - TEMPLATE_TOKENS)
        context = both_ends(context, most * MOST_CHARACTERS_A_TOKEN)
        whole = opening + context + question
        if self.count(whole) <= most:
            return whole
        return largest_that_fits(
            lambda size: opening + both_ends(context, size) + question, 0, most, self.count
        )


def longbench(name: str, rng: Random, n: int, reading: Reading) -> list[Case]:
    """`n` random cases of a subset, or all where it has fewer.

    Raises:
        ValueError: in one line, when the data cannot be had or has another schema.
    """
    subset = SUBSETS[name]
    data = load_longbench(name, reading.folder)
    cases = []
    for row in _some(range(len(data)), rng, n):
        record = _checked(Record, data[row], f"{name}, record {row + 1}")
        question = subset.question.replace("{input}", record.input)
        answers = tuple(answer for answer in record.answers if answer.strip())
        if not answers:
            continue
        cases.append(
            Case(
                prompt=reading.prompt(
                    subset.opening, record.context, question, subset.answer_tokens
                ),
                answer=answers,
                task=name,
                max_tokens=subset.answer_tokens,
                match=subset.match,
                form=subset.form,
                question_characters=len(question) or None,
            )
        )
    return cases


def longbench_v2(length: str, rng: Random, n: int, reading: Reading) -> list[Case]:
    """`n` random cases of LongBench-v2 that it calls `short`, `medium` or `long`, or all.

    Raises:
        ValueError: in one line, when the data cannot be had or has another schema.
    """
    data = load_longbench_v2(reading.folder)
    if "length" not in data.column_names:
        raise ValueError("longbench-v2: no length in its records")
    rows = [row for row, said in enumerate(data["length"]) if said == length]
    cases = []
    for row in _some(rows, rng, n):
        record = _checked(RecordV2, data[row], f"longbench-v2, record {row + 1}")
        question = QUESTION_V2.format(**record.model_dump(exclude={"context"}))
        cases.append(
            Case(
                prompt=reading.prompt(OPENING_V2, record.context, question, ANSWER_TOKENS_V2),
                answer=(record.answer,),
                task=f"longbench-v2-{length}",
                max_tokens=ANSWER_TOKENS_V2,
                match="choice",
                question_characters=len(question),
            )
        )
    return cases


def both_ends(text: str, n: int) -> str:
    """The first and last characters, `n` in all."""
    return text if n >= len(text) else text[: n - n // 2] + text[len(text) - n // 2 :]


def _some(rows: Sequence[int], rng: Random, n: int) -> list[int]:
    """`n` of them in random order; a larger `n` adds to a smaller one."""
    order = list(rows)
    rng.shuffle(order)
    return order[:n]


def _checked(model: type[Checked], record: object, where: str) -> Checked:
    try:
        return model.model_validate(record)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"]))
        raise ValueError(f"{where}: {field}: {first['msg']}") from None
