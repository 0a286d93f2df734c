"""What one request may ask of the store."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from vllm_kvcompress.config import NO_STORE
from vllm_kvcompress.knobs import KnobError, is_number
from vllm_kvcompress.presets import shorten
from vllm_kvcompress.transport.levels import LOSSLESS, RECOMPUTE
from vllm_kvcompress.transport.settings import MOST_TTFT_MS

KNOB_PREFIX = "cachegen_"
LEVEL_KNOB, TTFT_KNOB = KNOBS = ("cachegen_level", "cachegen_ttft_ms")


class Knobs(NamedTuple):
    """level: 0 neither looks nor loads, 1-4 loads this one or the nearest stored; None: the best
    stored one. ttft_s: the level of each chunk is chosen so that the first token comes by then.
    """

    level: int | None = None
    ttft_s: float | None = None


def knobs_of(xargs: Mapping[str, Any] | None, has_store: bool = True) -> Knobs:
    """A request's knobs. Raises KnobError naming the key, the value and what is allowed."""
    given = {k: v for k, v in (xargs or {}).items() if str(k).startswith(KNOB_PREFIX)}
    for key, value in given.items():
        if key not in KNOBS:
            known = f"(given {shorten(value)}) is not a knob of CacheGen; known: {', '.join(KNOBS)}"
            raise KnobError(key, "unknown_knob", f"{shorten(key)} {known}")
        if not has_store:
            raise KnobError(key, "no_store", f"{key}={shorten(value)} is not allowed: {NO_STORE}")
    if len(given) == len(KNOBS):
        raise KnobError(
            LEVEL_KNOB,
            "level_and_ttft",
            f"{LEVEL_KNOB} and {TTFT_KNOB} exclude each other: give one of them "
            f"(got {shorten(given[LEVEL_KNOB])} and {shorten(given[TTFT_KNOB])})",
        )
    if LEVEL_KNOB in given:
        level = given[LEVEL_KNOB]
        if not is_number(level) or level not in range(LOSSLESS + 1):
            raise KnobError(
                LEVEL_KNOB,
                "bad_level",
                f"{LEVEL_KNOB}={shorten(level)} is not allowed: give a whole number from 0 (load "
                f"nothing, recompute) to {LOSSLESS} (lossless)",
            )
        return Knobs(level=int(level))
    if TTFT_KNOB in given:
        ttft_ms = given[TTFT_KNOB]
        if not is_number(ttft_ms) or not 0 < ttft_ms <= MOST_TTFT_MS:
            raise KnobError(
                TTFT_KNOB,
                "bad_ttft",
                f"{TTFT_KNOB}={shorten(ttft_ms)} is not allowed: give a number of milliseconds "
                f"above 0, up to {MOST_TTFT_MS}",
            )
        return Knobs(ttft_s=ttft_ms / 1000)
    return Knobs()


def knobs_or_text(xargs: Mapping[str, Any] | None) -> Knobs:
    """As `knobs_of`, for where an error can no longer be told to anybody."""
    try:
        return knobs_of(xargs)
    except KnobError:
        return Knobs(level=RECOMPUTE)
