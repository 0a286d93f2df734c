"""The demo model's own tasks as cases: facts, many facts and songs in its little language."""

import re
from random import Random

from vllm_kvcompress.bench.demo_model.language import (
    Task,
    many_facts_task,
    needle_task,
    span_task,
)
from vllm_kvcompress.bench.quality.case import Case

FACTS = 16
SPARE_TOKENS = 4  # what an answer may go on for before it is cut, and wrong

_QUESTIONS = (" What is the code of ", " Continue: ")
_ANSWER_PIECE = re.compile(r"[a-z]+|[0-9]|\.")  # a token each


def needle(rng: Random, length: int, depth: float | None = None) -> Case:
    """One fact, asked for at the end; anywhere when `depth` is None."""
    return as_case(needle_task(rng, length, rng.random() if depth is None else depth))


def many_facts(rng: Random, length: int) -> Case:
    """Sixteen facts scattered over the prompt; one is asked for."""
    return as_case(many_facts_task(rng, length, FACTS))


def span(rng: Random, length: int, depth: float | None = None) -> Case:
    """A song, to be gone on with from its first four words; anywhere when `depth` is None."""
    return as_case(span_task(rng, length, rng.random() if depth is None else depth))


def as_case(task: Task) -> Case:
    """A chat task, with its question told apart from its haystack.

    Raises:
        ValueError: the prompt asks nothing.
    """
    question = max(task.prompt.rfind(opening) for opening in _QUESTIONS)
    if question < 0:
        raise ValueError(f"a prompt of task {task.task} has no question")
    return Case(
        prompt=task.prompt,
        answer=(task.answer,),
        task=task.task.replace("_", "-"),
        length=task.length_tokens,
        depth=task.depth,
        max_tokens=len(_ANSWER_PIECE.findall(task.answer)) + SPARE_TOKENS,
        form=task.form,
        question_characters=len(task.prompt) - question,
    )
