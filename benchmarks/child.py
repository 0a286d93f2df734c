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
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from vllm_kvcompress.bench.engine import EngineSpec, Round, Workload, environment, open_engine, run

MODULE = "vllm_kvcompress.bench.child"


class Child:
    """The asking side; a context manager that starts the process and ends it.

    Args:
        spec: the engine.
        plugin: False keeps this project's plugin from being loaded at all.
    """

    def __init__(self, name: str, spec: EngineSpec, threads: int, plugin: bool = True) -> None:
        self.name = name
        self._spec, self._threads, self._plugin = spec, threads, plugin

    def __enter__(self) -> Self:
        self._log = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", MODULE, json.dumps(asdict(self._spec))],
            env={**os.environ, **environment(self._threads, self._plugin)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=Path(__file__).resolve().parents[1],
        )
        self._answer()
        self._process.send_signal(signal.SIGSTOP)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def run(self, work: Workload, trace: bool = False) -> Round:
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        print(json.dumps({**asdict(work), "trace": trace}), file=self._process.stdin, flush=True)
        done = Round(**self._answer())
        self._process.send_signal(signal.SIGSTOP)
        return done

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            last = "\n".join(self._log.read().splitlines()[-15:])
            raise RuntimeError(f"the engine {self.name!r} has ended:\n{last}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def serve(spec: EngineSpec, questions: TextIO, answers: TextIO) -> None:
    """The answering side: open the engine, then a round per line until there are no more."""
    llm = open_engine(spec)
    _say(answers, {"ready": True})
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
