"""A request's knobs: `kv_compress` and its kin in `vllm_xargs`, with their bounds and refusals."""

from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

from vllm_kvcompress.presets import MAX_RATE, TASKS, shorten

REQUEST_PREFIX = "kv_compress"
AUTO = "auto"


class KnobError(ValueError):
    """A request's knob that is refused: `knob` is its key, `reason` a short label for counters."""

    def __init__(self, knob: str, reason: str, message: str) -> None:
        super().__init__(message)
        self.knob, self.reason = knob, reason


def is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: Any) -> TypeGuard[int | float]:
    return is_number(value) and (isinstance(value, int) or value.is_integer())


def _rate(value: Any, _: int) -> float:
    if is_number(value) and 1 <= value <= MAX_RATE:
        return float(value)
    raise ValueError(f"a number from 1 (keep everything) to {MAX_RATE} (keep a {MAX_RATE}th)")


def _budget(value: Any, max_tokens: int) -> int:
    if _is_whole(value) and 1 <= value <= max_tokens:
        return int(value)
    raise ValueError(f"a whole number of tokens from 1 to {max_tokens}")


def _question(value: Any, max_tokens: int) -> int:
    if _is_whole(value) and 0 <= value <= max_tokens:
        return int(value)
    raise ValueError(f"a whole number of tokens, from 0 to {max_tokens}, at the prompt's end")


def _task(value: Any, _: int) -> str:
    if value in (*TASKS, AUTO):
        return str(value)
    raise ValueError(f"one of {', '.join((*TASKS, AUTO))}")


FIELDS: Mapping[str, tuple[str, Callable[[Any, int], Any]]] = {
    "kv_compress_rate": ("rate", _rate),
    "kv_compress_budget": ("budget_tokens", _budget),
    "kv_compress_question": ("question_tokens", _question),
    "kv_compress_task": ("task", _task),
}
"""Knob -> the field of `Settings` that it sets, and what reads its value."""
REQUEST_KEYS = (REQUEST_PREFIX, *FIELDS)


def known_knobs(xargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Ours among a request's `vllm_xargs`; keys of other extensions pass.

    Raises:
        KnobError: one begins as ours do and is none.
    """
    knobs = {k: v for k, v in (xargs or {}).items() if str(k).startswith(REQUEST_PREFIX)}
    for key, value in knobs.items():
        if key not in REQUEST_KEYS and key.startswith(f"{REQUEST_PREFIX}_"):
            raise KnobError(
                key,
                "unknown_knob",
                f"{shorten(key)} (given {shorten(value)}) is not a knob of kv-compress; "
                f"known: {', '.join(REQUEST_KEYS)}",
            )
    return knobs


def changed_fields(knobs: Mapping[str, Any], max_tokens: int) -> dict[str, Any]:
    """The fields of `Settings` that knobs set; `max_tokens` bounds those that count tokens.

    Raises:
        KnobError: naming the key, the value and what is allowed.
    """
    rate, budget = knobs.get("kv_compress_rate"), knobs.get("kv_compress_budget")
    if rate is not None and budget is not None:
        raise KnobError(
            "kv_compress_rate",
            "rate_and_budget",
            "kv_compress_rate and kv_compress_budget exclude each other: give one of them "
            f"(got {shorten(rate)} and {shorten(budget)})",
        )
    changes: dict[str, Any] = {"budget_tokens": None} if "kv_compress_rate" in knobs else {}
    for key, (field, read) in FIELDS.items():
        if key in knobs:
            try:
                changes[field] = read(knobs[key], max_tokens)
            except ValueError as wanted:
                reason = "bad_" + key.removeprefix(f"{REQUEST_PREFIX}_")
                message = f"{key}={shorten(knobs[key])} is not allowed: give {wanted}"
                raise KnobError(key, reason, message) from None
    return changes
