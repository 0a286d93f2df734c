"""What happened to a request on its way to the first token, as it can be drawn."""

from collections import OrderedDict
from collections.abc import Iterable
from enum import StrEnum
from typing import Any, NamedTuple

REQUESTS_KEPT = 8


class Event(StrEnum):
    REQUEST = "request"  # from its arrival to its target, where it has one
    FETCH = "fetch"
    DECODE = "decode"
    COMPUTE = "compute"
    FIRST_TOKEN = "first_token"


class Mark(NamedTuple):
    """One thing that happened to tokens `first` to `last` (not included), in seconds since 1970."""

    event: str
    request_id: str
    first: int
    last: int
    level: int
    began: float
    ended: float


class Timelines:
    """The marks of the requests that were loaded for last, by request, oldest first."""

    def __init__(self) -> None:
        self._requests: OrderedDict[str, list[Mark]] = OrderedDict()

    def add(self, marks: Iterable[Any]) -> None:
        for mark in (Mark(*fields) for fields in marks):
            self._requests.setdefault(mark.request_id, []).append(mark)
            while len(self._requests) > REQUESTS_KEPT:
                self._requests.popitem(last=False)

    def to_list(self) -> list[dict[str, Any]]:
        """For JSON; times are milliseconds since the request's arrival."""
        return [as_json(marks) for marks in self._requests.values()]


def as_json(marks: list[Mark]) -> dict[str, Any]:
    """One request; `target_ms` is None where it has none."""
    asked = next((mark for mark in marks if mark.event == Event.REQUEST), marks[0])
    token = next((mark for mark in marks if mark.event == Event.FIRST_TOKEN), None)

    def ms(time_s: float) -> float:
        return round(1000 * (time_s - asked.began), 3)

    return {
        "request_id": asked.request_id,
        "prompt_tokens": asked.last,
        "target_ms": ms(asked.ended) or None,
        "first_token_ms": ms(token.ended) if token else None,
        "marks": [
            {
                "event": mark.event,
                "tokens": [mark.first, mark.last],
                "level": mark.level,
                "ms": [ms(mark.began), ms(mark.ended)],
            }
            for mark in marks
            if mark.event in (Event.FETCH, Event.DECODE, Event.COMPUTE)
        ],
    }
