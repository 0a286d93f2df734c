"""KV arrays to sections of bytes and back, by the C++ in csrc/codec.

A KV array here is `[sections, tokens, channels]`: K and V of each layer in turn, channels are
heads x head size. bf16 and fp16 travel as uint16 arrays of their bits.
"""

from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Any, NamedTuple, Protocol

import numpy as np
from safetensors.numpy import load

from vllm_kvcompress.transport.levels import Plan

DTYPES = ("bfloat16", "float16", "float32")
ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
CODEBOOK_VERSION = 1


class CodecMissing(RuntimeError):
    """The C++ part was not built at install."""


class CorruptChunk(ValueError):
    """Bytes that no encoder wrote, or that were changed since."""


class Tables(NamedTuple):
    """Offline statistics of a model at one level, as a profile holds them."""

    frequencies: np.ndarray  # uint16 [sections, channels, 32]
    channels: np.ndarray  # uint8 [sections, channels, 4]


class Encoded(NamedTuple):
    """Sections as bytes, each a multiple of 8 long, and how each channel was coded."""

    records: np.ndarray  # uint8 [sections, channels, 4]
    sections: list[bytes]


class Sections(Protocol):
    """What codes sections: `SectionCodec` arrays, `CudaSections` tensors on a GPU."""

    @property
    def isa(self) -> str:
        """What codes them, in a word."""

    def encode(
        self,
        values: Any,
        dtype: str,
        plan: Plan,
        tables: Tables | None = None,
        *,
        heads: int = 1,
        relative: bool = True,
    ) -> Encoded:
        """See `SectionCodec.encode`."""

    def decode(
        self,
        data: np.ndarray,
        ends: np.ndarray,
        records: np.ndarray,
        dtype: str,
        out: Any,
        tables: Tables | None = None,
    ) -> None:
        """See `SectionCodec.decode`."""


def _extension() -> Any:
    try:
        from vllm_kvcompress.transport import _codec
    except ImportError as error:
        raise CodecMissing(
            "CacheGen's codec is not built: it needs a C++17 compiler and Python's headers (on "
            f"Debian g++ and python3-dev). Install them, then this package again. ({error})"
        ) from None
    return _codec


def instruction_sets() -> list[str]:
    """What this machine can run, the slowest first; each gives the same bytes."""
    return list(_extension().instruction_sets())


def as_bits(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values as an array of `dtype`, rounded to nearest even."""
    values = np.ascontiguousarray(values, np.float32)
    if dtype == "float32":
        return values
    if dtype == "float16":
        return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def as_floats(values: np.ndarray, dtype: str) -> np.ndarray:
    """The float32 values of an array of `dtype`."""
    if dtype == "float32":
        return values
    if dtype == "float16":
        return values.view(np.float16).astype(np.float32)
    return (values.astype(np.uint32) << 16).view(np.float32)


@cache
def codebook() -> dict[str, np.ndarray]:
    """The tables that ship with the package, part of the format."""
    data = resources.files("vllm_kvcompress.transport").joinpath("codebook.safetensors")
    return load(data.read_bytes())


class SectionCodec:
    """Encodes and decodes on `threads` threads; safe to share between threads.

    `isa` is one of `instruction_sets()`; by default the fastest. Raises CodecMissing.
    """

    def __init__(self, threads: int = 1, isa: str = "") -> None:
        book = codebook()
        self._native = _extension().Codec(book["frequencies"], book["spreads"], isa)
        self.threads = threads

    @property
    def isa(self) -> str:
        return self._native.isa

    def encode(
        self,
        values: np.ndarray,
        dtype: str,
        plan: Plan,
        tables: Tables | None = None,
        *,
        heads: int = 1,
        relative: bool = True,
    ) -> Encoded:
        """`values` is `[sections, tokens, channels]`.

        Each head has a fixed step of its own: the plan's parameter, one per section or per
        section and head, is a multiple of the head's root mean square where `relative`, else the
        step itself. Values that a lossy quantiser cannot hold (infinities, NaN, beyond 8,191
        steps) make their section lossless.
        """
        parameters = plan.parameters
        if parameters.ndim == 1:
            parameters = np.repeat(parameters[:, None], heads, axis=1)
        records, sections = self._native.encode(
            np.ascontiguousarray(values),
            DTYPES.index(dtype),
            plan.quantisers,
            np.ascontiguousarray(parameters, np.float32),
            relative,
            *(tables or (None, None)),
            self.threads,
        )
        return Encoded(records, sections)

    def decode(
        self,
        data: np.ndarray,
        ends: Sequence[int] | np.ndarray,
        records: np.ndarray,
        dtype: str,
        out: np.ndarray,
        tables: Tables | None = None,
    ) -> None:
        """Fill `out` from sections that stand one after another in `data` (uint8) and end at
        `ends`. Raises CorruptChunk; `out` is then undefined."""
        try:
            self._native.decode(
                data,
                np.asarray(ends, np.uint64),
                records,
                DTYPES.index(dtype),
                *(tables or (None, None)),
                out,
                self.threads,
            )
        except ValueError as error:
            raise CorruptChunk(str(error)) from None
