"""`--prompts FILE.jsonl`: anyone's cases, a JSON object a line."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pydantic import ValidationError
from pydantic_core import ErrorDetails, from_json

from vllm_kvcompress.bench.quality.case import Case

MAX_LINE_BYTES = 32 * 2**20
MAX_FILE_BYTES = 2 * 2**30
MAX_CASES = 100_000
MAX_BAD_LINES = 1000
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class BadLine:
    """A line that is no case: its number, counted from 1, and why in one line."""

    number: int
    reason: str

    def __str__(self) -> str:
        return f"line {self.number}: {self.reason}"


def read_prompts(path: Path) -> tuple[list[Case], list[BadLine]]:
    """The cases of a file, and its lines that are none; empty lines are neither.

    Raises:
        ValueError: in one line, when the file cannot be read, is larger than 2 GiB, or has more
            than 100,000 cases or 1,000 bad lines.
    """
    cases: list[Case] = []
    bad: list[BadLine] = []
    try:
        with path.open("rb") as file:
            for number, line in _lines(file, path):
                try:
                    cases.append(_case(line))
                except ValueError as error:
                    bad.append(BadLine(number, str(error)))
                if len(cases) > MAX_CASES:
                    raise ValueError(f"{path} has more than {MAX_CASES:,} cases: split it")
                if len(bad) > MAX_BAD_LINES:
                    raise ValueError(
                        f"{path} has more than {MAX_BAD_LINES:,} bad lines, the first on {bad[0]}"
                    )
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    return cases, bad


def _lines(file: BinaryIO, path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Numbered lines that hold something; None for one that is too long."""
    number = size = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        size += len(line)
        too_long = len(line) > MAX_LINE_BYTES
        while too_long and line and not line.endswith(b"\n") and size <= MAX_FILE_BYTES:
            line = file.readline(MAX_LINE_BYTES)
            size += len(line)
        if size > MAX_FILE_BYTES:
            raise ValueError(f"{path} is larger than {MAX_FILE_BYTES / 2**30:g} GiB: split it")
        if number == 1:
            line = line.removeprefix(_BYTE_ORDER_MARK)
        if too_long or line.strip():
            yield number, None if too_long else line


def _case(line: bytes | None) -> Case:
    """Raises ValueError with the reason when `line` is no case."""
    if line is None:
        raise ValueError(f"longer than {MAX_LINE_BYTES / 2**20:g} MiB")
    try:
        fields = from_json(line.strip().decode(), allow_inf_nan=False)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start + 1}") from None
    except ValueError as error:
        raise ValueError(f"not JSON: {error}".replace(" at line 1 column", " at column")) from None
    if not isinstance(fields, dict):
        raise ValueError("not a JSON object")
    if isinstance(fields.get("answer"), list):
        fields["answer"] = tuple(fields["answer"])
    try:
        case = Case.model_validate(fields, strict=True)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)
        raise ValueError("; ".join(dict.fromkeys(map(_reason, details)))) from None
    if case.question_characters is not None and case.question_characters >= len(case.prompt):
        raise ValueError(
            f"question_characters: {case.question_characters} leave no context "
            f"in a prompt of {len(case.prompt)}"
        )
    return case


def _reason(error: ErrorDetails) -> str:
    field = str(error["loc"][0]) if error["loc"] else ""
    if error["type"] == "missing":
        return f"no {field!r}"
    if error["type"] == "extra_forbidden":
        return f"unknown key {field[:80]!r}: the keys are {', '.join(Case.model_fields)}"
    if field == "answer" and error["type"] == "too_short":
        return "answer: there is none"
    if field == "answer" and error["type"].endswith("_type"):
        return "answer: must be a string or a list of strings"
    return f"{field}: {error['msg'][0].lower()}{error['msg'][1:]}"
