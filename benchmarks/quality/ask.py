"""What is asked of an engine, a server or a peer, and what it answers: plain data."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

from vllm_kvcompress import accounting
from vllm_kvcompress.presets import OFF, Preset

MANY_BLOCKS = 2**31
TOLERANCE = 0.2  # of the wish


@dataclass(frozen=True, slots=True)
class Prompt:
    """A case as tokens; the last `question_tokens` are those an unseen question takes."""

    token_ids: tuple[int, ...]
    question_tokens: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Ask:
    """One prompt under one row. `held_tokens`, of the context, are what the row may keep."""

    prompt: Prompt
    preset: str
    question_tokens: int
    held_tokens: int

    @property
    def context_tokens(self) -> int:
        return len(self.prompt.token_ids) - self.question_tokens

    def knobs(self) -> dict[str, str | int]:
        """As a request's `vllm_xargs`."""
        if self.preset == OFF:
            return {"kv_compress": OFF}
        knobs: dict[str, str | int] = {"kv_compress": self.preset}
        knobs["kv_compress_budget"] = self.held_tokens
        if self.question_tokens:
            knobs["kv_compress_question"] = self.question_tokens
        return knobs


@dataclass(frozen=True, slots=True)
class Answer:
    """`held_tokens` per head on average where the answering side counted them itself."""

    text: str
    held_tokens: float | None = None
    error: str = ""


class Answerer(Protocol):
    """Something that answers; a context manager that starts and ends it."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *raised: Any) -> None: ...

    def answers(self, asks: Sequence[Ask]) -> Iterator[Answer]:
        """One answer an ask, in their order.

        Raises:
            BenchError: it cannot answer any more, and why.
        """
        ...


def held_tokens(
    context_tokens: int, budget: float, block_tokens: int, preset: Preset | None
) -> int | None:
    """Prompt tokens a head holds on average, in whole pages, nearest to `budget` of the context.

    Args:
        budget: the wish, a share of the context.
        preset: whose protected tokens must fit; None for a system without pages of its own,
            which is held to the same number.

    Returns:
        None where whole pages and the partly filled block's tokens get no nearer than
        `TOLERANCE`, or where everything would be kept.
    """
    tail, wish = context_tokens % block_tokens, budget * context_tokens
    blocks = max(1, round((wish - tail) / block_tokens))
    held = blocks * block_tokens + tail
    if abs(held - wish) > TOLERANCE * wish or held >= context_tokens:
        return None
    if preset is None:
        return held
    settings = preset.settings(budget_tokens=held)
    plan = accounting.plan(context_tokens, block_tokens, MANY_BLOCKS, settings)
    reached = plan.first_point == context_tokens and plan.arena_blocks == blocks
    return held if reached else None
