"""A process that is asked in lines of JSON and answers in lines of JSON."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, Self, TextIO

GOODBYE_S = 20.0
INVALID = re.compile(r"\d+ validation errors? for \w+$")


class ProcessEnded(RuntimeError):
    """It could not start, or died. `reason`: the last thing it said, one line."""

    def __init__(self, name: str, log: str) -> None:
        lines = [line.strip() for line in log.splitlines() if line.strip()]
        self.reason = last_words(lines)
        super().__init__(f"{name} has ended: {self.reason}")


def last_words(lines: Sequence[str]) -> str:
    """The message of the last exception in a log, else its last line."""
    said = [line.removeprefix("[rank0]:").strip() for line in lines]
    for number, line in reversed(list(enumerate(said))):
        kind, _, message = line.partition(": ")
        if message and kind.split(".")[-1].isidentifier() and kind.endswith(("Error", "Exit")):
            return _first_problem(said[number + 1 :]) if INVALID.match(message) else message
    return said[-1] if said else "it said nothing"


def _first_problem(lines: Sequence[str]) -> str:
    """Of a pydantic ValidationError's lines: where, and what; without type, value and link."""
    return " ".join(lines).partition(" [type=")[0].removeprefix("Value error, ")


class LineProcess:
    """The asking side; a context manager that starts the process and ends it.

    Args:
        name: what messages call it.
        command: the program and its arguments.
        environment: over this process's own.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.name, self._command = name, list(command)
        self._environment = {**os.environ, **environment}

    def __enter__(self) -> Self:
        self._log = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            self._command,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        return self

    def __exit__(self, *raised: Any) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.close()
            self._process.wait(timeout=0 if any(raised) else GOODBYE_S)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def send_signal(self, number: int) -> None:
        self._process.send_signal(number)

    def tell(self, question: Mapping[str, Any]) -> None:
        """Send a question. Raises ProcessEnded."""
        assert self._process.stdin is not None
        try:
            print(json.dumps(question), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise self._ended() from None

    def hear(self) -> dict[str, Any]:
        """Wait for the next answer. Raises ProcessEnded."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _ended(self) -> ProcessEnded:
        self._log.seek(0)
        return ProcessEnded(self.name, self._log.read())


def answer_stream() -> TextIO:
    """In the answering process: where answers go, with all that is printed kept out of it."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def say(answers: TextIO, answer: Mapping[str, Any]) -> None:
    print(json.dumps(answer), file=answers, flush=True)


def questions() -> TextIO:
    return sys.stdin
