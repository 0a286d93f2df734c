"""An engine in a process of its own, asked for one round at a time.

Several of them stay alive side by side, so rounds of different engines can take turns. Only the
one that was asked works: the others are stopped, as an idle engine's threads keep polling.
Questions and answers are lines of JSON.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from vllm_kvcompress.bench.engine import (
    Cache,
    EngineSpec,
    Round,
    Workload,
    cache_of,
    environment,
    open_engine,
    run,
)

COMMAND = (sys.executable, "-m", "vllm_kvcompress.bench.child")


class EngineEnded(RuntimeError):
    """An engine that could not start, or died.

    reason: the last thing it said, one line.
    """

    def __init__(self, name: str, log: str) -> None:
        lines = [line.strip() for line in log.splitlines() if line.strip()]
        self.reason = last_words(lines)
        super().__init__(f"the engine {name!r} has ended:\n" + "\n".join(lines[-15:]))


def last_words(lines: Sequence[str]) -> str:
    """The message of the last exception in a log, else its last line."""
    said = [line.removeprefix("[rank0]:").strip() for line in lines]
    for line in reversed(said):
        kind, _, message = line.partition(": ")
        if message and kind.split(".")[-1].isidentifier() and kind.endswith(("Error", "Exit")):
            return message
    return said[-1] if said else "it said nothing"


class Child:
    """The asking side; a context manager that starts the process and ends it.

    Args:
        spec: the engine.
        plugin: False keeps this project's plugin from being loaded at all.
        command: what answers; the engine's specification is appended as JSON.

    Raises:
        EngineEnded: on entering, and by `run`.
    """

    cache: Cache

    def __init__(
        self,
        name: str,
        spec: EngineSpec,
        threads: int,
        plugin: bool = True,
        command: Sequence[str] = COMMAND,
    ) -> None:
        self.name, self.spec = name, spec
        self._threads, self._plugin, self._command = threads, plugin, command

    def __enter__(self) -> Self:
        self._log = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [*self._command, json.dumps(asdict(self.spec))],
            env={**os.environ, **environment(self._threads, self._plugin)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=Path(__file__).resolve().parents[1],
        )
        try:
            self.cache = Cache(**self._answer())
        except BaseException:
            self._end()
            raise
        self._process.send_signal(signal.SIGSTOP)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def run(self, work: Workload, trace: bool = False) -> Round:
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        try:
            print(
                json.dumps({**asdict(work), "trace": trace}), file=self._process.stdin, flush=True
            )
        except BrokenPipeError:
            raise self._ended() from None
        done = Round(**self._answer())
        self._process.send_signal(signal.SIGSTOP)
        return done

    def _end(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.send_signal(signal.SIGCONT)
        try:
            self._process.stdin.close()
            self._process.wait(timeout=20)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _ended(self) -> EngineEnded:
        self._log.seek(0)
        return EngineEnded(self.name, self._log.read())


def serve(spec: EngineSpec, questions: TextIO, answers: TextIO) -> None:
    """The answering side: open the engine, then a round per line until there are no more."""
    llm = open_engine(spec)
    _say(answers, asdict(cache_of(llm)))
    for line in questions:
        question = json.loads(line)
        trace = question.pop("trace")
        _say(answers, asdict(run(llm, Workload(**question), trace)))


def _say(answers: TextIO, answer: Mapping[str, Any]) -> None:
    print(json.dumps(answer), file=answers, flush=True)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints is no answer
    serve(EngineSpec(**json.loads(sys.argv[1])), sys.stdin, answers)


if __name__ == "__main__":
    main()
