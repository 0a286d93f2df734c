"""An engine in a process of its own, asked for one round at a time.

Several of them stay alive side by side, so rounds of different engines can take turns. Only the
one that was asked works: the others are stopped, as an idle engine's threads keep polling.
"""

import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from types import TracebackType
from typing import Self

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
from vllm_kvcompress.bench.process import LineProcess, answer_stream, questions, say

COMMAND = (sys.executable, "-P", "-m", "vllm_kvcompress.bench.child")


class Child(LineProcess):
    """The asking side; a context manager that starts the process and ends it.

    Args:
        spec: the engine.
        plugin: False keeps this project's plugin from being loaded at all.
        command: what answers; the engine's specification is appended as JSON.

    Raises:
        ProcessEnded: on entering, and by `run`.
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
        super().__init__(name, [*command, json.dumps(asdict(spec))], environment(threads, plugin))

    def __enter__(self) -> Self:
        super().__enter__()
        try:
            self.cache = Cache(**self.hear())
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        self.send_signal(signal.SIGSTOP)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.send_signal(signal.SIGCONT)
        super().__exit__(kind, error, trace)

    def run(self, work: Workload, trace: bool = False) -> Round:
        self.send_signal(signal.SIGCONT)
        self.tell({**asdict(work), "trace": trace})
        done = Round(**self.hear())
        self.send_signal(signal.SIGSTOP)
        return done


def main() -> None:
    """The answering side: open the engine, then a round per line until there are no more."""
    answers = answer_stream()
    llm = open_engine(EngineSpec(**json.loads(sys.argv[1])))
    say(answers, asdict(cache_of(llm)))
    for line in questions():
        question = json.loads(line)
        trace = question.pop("trace")
        say(answers, asdict(run(llm, Workload(**question), trace)))


if __name__ == "__main__":
    main()
