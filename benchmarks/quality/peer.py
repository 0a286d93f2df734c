"""Ask kvpress, as an `Answerer`."""

from collections.abc import Iterator, Sequence
from typing import Any, Self

from vllm_kvcompress.bench.errors import BenchError
from vllm_kvcompress.bench.peers.errors import PeerError
from vllm_kvcompress.bench.peers.kvpress import KVPress, PeerAsk
from vllm_kvcompress.bench.peers.spec import PeerSpec
from vllm_kvcompress.bench.quality.ask import Answer, Ask


class Peer:
    """kvpress with one model; `Ask.preset` names the press, as `str(PeerSpec)` does.

    Raises:
        BenchError: on entering, when it cannot start or does not know one of the presses.
    """

    def __init__(self, press: KVPress, specs: Sequence[PeerSpec]) -> None:
        self._press, self._specs = press, {str(spec): spec for spec in specs}

    def __enter__(self) -> Self:
        try:
            self._press.__enter__()
        except PeerError as error:
            raise BenchError(str(error)) from None
        try:
            for spec in self._specs.values():
                self._press.check(spec)
        except (PeerError, ValueError) as error:
            self._press.__exit__(type(error), error, None)
            raise BenchError(str(error)) from None
        return self

    def __exit__(self, *raised: Any) -> None:
        self._press.__exit__(*raised)

    def answers(self, asks: Sequence[Ask]) -> Iterator[Answer]:
        wanted = (
            PeerAsk(
                "",
                self._specs[ask.preset],
                ask.prompt.token_ids,
                ask.prompt.max_tokens,
                ask.held_tokens,
                ask.question_tokens,
            )
            for ask in asks
        )
        try:
            for answer in self._press.answers(wanted):
                yield Answer(answer.text, answer.kept_tokens, answer.error or "")
        except PeerError as error:
            raise BenchError(str(error)) from None
