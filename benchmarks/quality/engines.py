"""Ask a vLLM engine in a process of its own, without a server."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, Self

from vllm_kvcompress.bench.engine import EngineSpec, environment
from vllm_kvcompress.bench.errors import BenchError
from vllm_kvcompress.bench.process import LineProcess, ProcessEnded
from vllm_kvcompress.bench.quality.ask import Answer, Ask

CHILD = "vllm_kvcompress.bench.quality.engine_child"


class Engine:
    """An `Answerer`. The prompts of one call share their blocks by prefix caching.

    Args:
        plugin: False for plain vLLM, which is asked without knobs.
        at_once: most prompts in one call.

    Raises:
        BenchError: on entering, when the engine cannot start.
    """

    def __init__(
        self, name: str, spec: EngineSpec, threads: int, plugin: bool, at_once: int
    ) -> None:
        self._plugin, self._at_once = plugin, at_once
        self._process = LineProcess(
            name,
            [sys.executable, "-P", "-m", CHILD, json.dumps(asdict(spec))],
            environment(threads, plugin),
        )

    def __enter__(self) -> Self:
        self._process.__enter__()
        try:
            self.block_tokens: int = self._process.hear()["block_tokens"]
        except ProcessEnded as error:
            self._process.__exit__(type(error), error, None)
            raise BenchError(f"cannot start {self._process.name}: {error.reason}") from None
        except BaseException as error:
            self._process.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(self, *raised: Any) -> None:
        self._process.__exit__(*raised)

    def answers(self, asks: Sequence[Ask]) -> Iterator[Answer]:
        for start in range(0, len(asks), self._at_once):
            part = [self._question(ask) for ask in asks[start : start + self._at_once]]
            try:
                self._process.tell({"asks": part})
                texts = self._process.hear()["texts"]
            except ProcessEnded as error:
                raise BenchError(str(error)) from None
            yield from map(Answer, texts)

    def _question(self, ask: Ask) -> dict[str, object]:
        return {
            "token_ids": ask.prompt.token_ids,
            "max_tokens": ask.prompt.max_tokens,
            "knobs": ask.knobs() if self._plugin else None,
        }
