"""One prompt and what a right answer is: all that the quality bench knows of a task."""

import hashlib
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

MAX_NEW_TOKENS = 4096

Match = Literal["exact", "contains", "contains-all", "rouge", "f1", "choice", "code", "number"]
Form = Literal["chat", "plain"]


def _as_tuple(value: object) -> object:
    return (value,) if isinstance(value, str) else value


class Case(BaseModel):
    """A case, frozen and checked; its fields are also those of a line of `--prompts FILE.jsonl`.

    answer: one or several; a list means any of them, but all of them under `contains-all`.
    length: tokens that the prompt was made for, or None.
    depth: where the fact stands, 0 (first) to 1 (right before the question), or None.
    max_tokens: tokens to generate; None for as many as the longest answer has.
    form: `chat` prompts are one user turn, `plain` ones are completed as they are.
    question_characters: how many characters at the prompt's end are the question, that which a
        cache compressed beforehand has not seen; None where context and question are one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: str = Field(min_length=1)
    answer: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...],
        BeforeValidator(_as_tuple),
        Field(min_length=1),
    ]
    task: str = "prompts"
    length: int | None = Field(default=None, ge=1)
    depth: float | None = Field(default=None, ge=0, le=1)
    max_tokens: int | None = Field(default=None, ge=1, le=MAX_NEW_TOKENS)
    match: Match = "exact"
    form: Form = "chat"
    question_characters: int | None = Field(default=None, ge=1)

    @property
    def key(self) -> str:
        """The same in every run for the same case, and different for any other."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]
