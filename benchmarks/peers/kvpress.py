"""NVIDIA kvpress on our prompts: the asking side. `kvpress_worker.py` is the side that answers."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from vllm_kvcompress.bench.peers.errors import PeerError
from vllm_kvcompress.bench.peers.spec import PeerSpec
from vllm_kvcompress.bench.process import LineProcess, ProcessEnded

WORKER = Path(__file__).with_name("kvpress_worker.py")


@dataclass(frozen=True)
class PeerAsk:
    """A prompt for a press.

    key: handed back with the answer.
    prompt_ids: with the chat template applied.
    kept_tokens: to hold per head on average, of the prompt less its question; as many as it has,
        or more, mean its full cache.
    question_tokens: the prompt's last ones, which are read only after the rest was compressed.

    Raises:
        ValueError: a number that cannot be.
    """

    key: str
    spec: PeerSpec
    prompt_ids: Sequence[int]
    max_tokens: int
    kept_tokens: int
    question_tokens: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.kept_tokens < 1:
            raise ValueError(f"{self.max_tokens} tokens to write, {self.kept_tokens} to keep")
        if not 0 <= self.question_tokens < len(self.prompt_ids):
            raise ValueError(
                f"a question of {self.question_tokens} tokens in {len(self.prompt_ids)}"
            )


@dataclass(frozen=True)
class PeerAnswer:
    """What a press answered, or why it did not.

    kept_tokens: really held after the compression, mean over layers and heads; None with an
        error. A question that was read afterwards comes on top.
    """

    key: str
    token_ids: tuple[int, ...] = ()
    text: str = ""
    kept_tokens: float | None = None
    error: str | None = None


class KVPress:
    """kvpress with a model open, in a process of its own; a context manager.

    Ask about the same prompt in a row: its prefill is then computed once.

    Args:
        python: of the environment that has kvpress (`environment.peer_python`).
        model: a folder or Hugging Face id.
        dtype: a torch dtype's name, or `auto`.
        threads: for torch.

    Raises:
        PeerError: the process cannot start, or ends.
    """

    def __init__(
        self, python: Path, model: str, dtype: str, threads: int, worker: Path = WORKER
    ) -> None:
        self.presses: Sequence[str] = ()
        self.versions: Mapping[str, str] = {}
        self.device = ""
        folder = Path(model).expanduser()
        self._opening = {
            "model": str(folder.resolve()) if folder.is_dir() else model,
            "dtype": dtype,
            "threads": threads,
        }
        environment = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        self._process = LineProcess("kvpress", [str(python), "-I", str(worker)], environment)

    def __enter__(self) -> Self:
        try:
            self._process.__enter__()
        except OSError as error:
            raise PeerError(f"kvpress cannot start: {error.strerror}: {error.filename}") from None
        try:
            ready = self._ask(self._opening)
        except BaseException as error:
            self._process.__exit__(type(error), error, None)
            raise
        self.presses, self.versions = tuple(ready["presses"]), ready["versions"]
        self.device = ready["device"]
        return self

    def __exit__(self, *raised: Any) -> None:
        self._process.__exit__(*raised)

    def check(self, spec: PeerSpec) -> None:
        """Make the press once.

        Raises:
            ValueError: kvpress does not know it, or does not take its arguments.
        """
        answer = self._ask({"id": 0, "check": spec.request()})
        if error := answer.get("error"):
            raise ValueError(f"{spec}: {error}")

    def answers(self, asks: Iterable[PeerAsk]) -> Iterator[PeerAnswer]:
        """In the order of the asks. A case that a press cannot do has its `error` set."""
        for number, ask in enumerate(asks):
            answer = self._ask(
                {
                    "id": number,
                    "prompt_ids": list(ask.prompt_ids),
                    "max_tokens": ask.max_tokens,
                    "kept_tokens": ask.kept_tokens,
                    "question_tokens": ask.question_tokens,
                    **ask.spec.request(),
                }
            )
            if answer.pop("id") != number:
                raise PeerError("kvpress answered another question than the one asked")
            token_ids = tuple(answer.pop("token_ids", ()))
            yield PeerAnswer(ask.key, token_ids, **answer)

    def _ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        try:
            self._process.tell(question)
            return self._process.hear()
        except ProcessEnded as error:
            raise PeerError(str(error)) from None
