"""LMCache's CacheGen codec for CPUs, by an interpreter whose environment has lmcache."""

import json
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

WORKER = Path(__file__).resolve().parent / "codec_lmcache.py"


class LmcacheFailed(RuntimeError):
    """The other interpreter gave no answer; the message is its last line."""


class Coded(NamedTuple):
    back: np.ndarray  # bf16 bits, as what was given
    bytes: int
    encode_s: float
    decode_s: float


class Lmcache:
    """A context: the interpreter runs as long as it lasts.

    Raises:
        LmcacheFailed: on entering, when that file cannot be run.
    """

    def __init__(self, python: Path) -> None:
        self.python, self.version = python, ""

    def __enter__(self) -> "Lmcache":
        self._folder = TemporaryDirectory()
        self._errors = (Path(self._folder.name) / "errors").open("w+")
        try:
            self._process = subprocess.Popen(
                [self.python.absolute(), WORKER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
            )
        except OSError as error:
            self._clean_up()
            raise LmcacheFailed(f"{self.python}: {error.strerror}") from None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.communicate()
        self._clean_up()

    def _clean_up(self) -> None:
        self._errors.close()
        self._folder.cleanup()

    def code(self, kv: np.ndarray, heads: int, chunk_tokens: int, bins: np.ndarray) -> Coded:
        """Encode and decode bf16 bits `[layers, 2, tokens, channels]`; `bins` is `[2, layers]`.

        Raises:
            LmcacheFailed: lmcache is missing there, or did not take this.
        """
        sent, back = (str(Path(self._folder.name) / name) for name in ("kv.npy", "back.npy"))
        np.save(sent, kv)
        said = self._ask(
            {"kv": sent, "back": back, "heads": heads, "chunk_tokens": chunk_tokens}
            | {"bins": bins.tolist()}
        )
        self.version = said["version"]
        return Coded(np.load(back), said["bytes"], said["encode_s"], said["decode_s"])

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended and said why
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            last = (self._errors.read().strip() or "no message").splitlines()[-1]
            raise LmcacheFailed(f"{self.python}: {last}")
        return dict(json.loads(line))


def default_bins(layers: int) -> np.ndarray:
    """LMCache's default `[2, layers]`: 32 in the first 10 (K) and 2 (V) of ten or more layers."""
    bins = np.full((2, layers), 32)
    if layers >= 10:
        bins[0, 10:] = bins[1, 2:] = 16
    return bins
