"""A request's wishes for the store are understood, or refused by name with what is allowed."""

import math

import pytest

from vllm_kvcompress.knobs import KnobError
from vllm_kvcompress.transport.knobs import Knobs, knobs_of, knobs_or_text

NOVEL = "x" * 100_000


@pytest.mark.parametrize(
    ("xargs", "means"),
    [
        (None, Knobs()),
        ({"other": 1, "cachegenerous": 2}, Knobs()),
        ({"cachegen_level": 0}, Knobs(level=0)),
        ({"cachegen_level": 4.0}, Knobs(level=4)),
        ({"cachegen_ttft_ms": 250}, Knobs(ttft_s=0.25)),
        ({"cachegen_ttft_ms": 0.5}, Knobs(ttft_s=0.0005)),
    ],
)
def test_good_knobs_are_understood(xargs, means) -> None:
    assert knobs_of(xargs) == means


@pytest.mark.parametrize(
    ("xargs", "reason", "says"),
    [
        ({"cachegen_level": 5}, "bad_level", "from 0 "),
        ({"cachegen_level": -1}, "bad_level", "to 4 "),
        ({"cachegen_level": 1.5}, "bad_level", "whole number"),
        ({"cachegen_level": True}, "bad_level", "True is not allowed"),
        ({"cachegen_level": "2"}, "bad_level", "'2' is not allowed"),
        ({"cachegen_level": None}, "bad_level", "None is not allowed"),
        ({"cachegen_level": math.nan}, "bad_level", "nan is not allowed"),
        ({"cachegen_level": 10**400}, "bad_level", "characters"),
        ({"cachegen_level": NOVEL}, "bad_level", "100000 characters"),
        ({"cachegen_ttft_ms": 0}, "bad_ttft", "above 0"),
        ({"cachegen_ttft_ms": -3}, "bad_ttft", "above 0"),
        ({"cachegen_ttft_ms": 10**7}, "bad_ttft", "up to 3600000"),
        ({"cachegen_ttft_ms": math.inf}, "bad_ttft", "up to"),
        ({"cachegen_ttft_ms": math.nan}, "bad_ttft", "nan is not allowed"),
        ({"cachegen_ttft_ms": "9"}, "bad_ttft", "milliseconds"),
        ({"cachegen_ttft_ms": [9]}, "bad_ttft", "milliseconds"),
        ({"cachegen_level": 2, "cachegen_ttft_ms": 9}, "level_and_ttft", "give one"),
        ({"cachegen_speed": 2}, "unknown_knob", "known: cachegen_level, cachegen_ttft_ms"),
        ({"cachegen_" + NOVEL: 2}, "unknown_knob", "100009 characters"),
    ],
)
def test_a_bad_knob_is_refused_by_name(xargs, reason, says) -> None:
    with pytest.raises(KnobError, match=says) as caught:
        knobs_of(xargs)
    assert caught.value.reason == reason and caught.value.knob == next(iter(xargs))
    assert caught.value.knob[:80] in str(caught.value) and len(str(caught.value)) < 400
    assert knobs_or_text(xargs) == Knobs(level=0)


def test_without_a_store_every_knob_is_refused() -> None:
    assert knobs_of({"other": 1}, has_store=False) == Knobs()
    for xargs in ({"cachegen_level": 2}, {"cachegen_ttft_ms": "bad"}):
        with pytest.raises(KnobError, match="no store: start it with `--kv-compress-store") as no:
            knobs_of(xargs, has_store=False)
        assert no.value.reason == "no_store"
