"""One chunk's bytes: self-describing, little-endian, checksummed, sections by layer.

    prefix (32 bytes) | header (JSON) | index | records (zstd) | arrays | sections

The index has 12 bytes per part: its length and its xxh3-64; the parts are the records, the
arrays, and K and V of each layer. The prefix's checksum covers the prefix, the header and the
index, so every length is known to be the writer's before anything is allocated by it, and every
one is bounded besides. Sections are independent: a reader may decode a layer when its bytes are
there. docs/cachegen.md has the layout in full.
"""

import json
import math
import struct
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import xxhash
import zstandard
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_kvcompress.transport.codec import (
    CODEBOOK_VERSION,
    ITEM_BYTES,
    CorruptChunk,
    Encoded,
)

MAGIC, VERSION = b"KVCG", 1
PREFIX = struct.Struct("<4sHHIIQQ")  # magic, version, 0, header bytes, parts, total, checksum
INDEX = np.dtype([("bytes", "<u4"), ("xxh3", "<u8")])
MAX_HEADER_BYTES = 1 << 16
MAX_LAYERS, MAX_CHANNELS, MAX_TOKENS = 1024, 65535, 32767
MAX_ARRAYS = 8
RECORD_BYTES = 4
ALIGN = 8


class WrongVersion(CorruptChunk):
    """A container of another version of the format."""


class ArrayInfo(BaseModel):
    """An array that travels beside the sections, such as a compressed arena's page counts."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = Field(max_length=64)
    dtype: Literal["int32", "int64", "float32"]
    shape: tuple[int, ...] = Field(max_length=4)


class Header(BaseModel):
    """What a chunk is. Decoding needs nothing else but the profile that `profile` names."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    layers: int = Field(ge=1, le=MAX_LAYERS)
    tokens: int = Field(ge=1, le=MAX_TOKENS)
    heads: int = Field(ge=1, le=MAX_CHANNELS)
    head_size: int = Field(ge=1, le=MAX_CHANNELS)
    dtype: Literal["bfloat16", "float16", "float32"]
    level: int = Field(ge=1, le=4)
    key: str = Field(default="", max_length=128)
    profile: str = Field(default="", max_length=64)
    codebook: int = CODEBOOK_VERSION
    arrays: tuple[ArrayInfo, ...] = Field(default=(), max_length=MAX_ARRAYS)

    @property
    def channels(self) -> int:
        return self.heads * self.head_size

    @property
    def sections(self) -> int:
        return 2 * self.layers

    @property
    def raw_bytes(self) -> int:
        """Of the decoded chunk."""
        return self.sections * self.tokens * self.channels * ITEM_BYTES[self.dtype]


class Container:
    """A parsed chunk: the header and index are checked, parts are when they are asked for."""

    def __init__(self, header: Header, index: np.ndarray, data: memoryview, start: int) -> None:
        self.header = header
        self._data = data
        self._index = index
        self._ends = start + np.cumsum(index["bytes"], dtype=np.int64)

    @property
    def total_bytes(self) -> int:
        return int(self._ends[-1])

    def bytes_until_layer(self, layer: int) -> int:
        """How many bytes from the start a reader needs to decode layers up to this one."""
        return int(self._ends[self._first_section + 2 * layer + 1])

    def section_bytes(self) -> np.ndarray:
        """Bytes of each section, int64 `[layers, 2]`, without its share of the records."""
        return self._index["bytes"][self._first_section :].astype(np.int64).reshape(-1, 2)

    def part(self, i: int) -> memoryview:
        """Raises CorruptChunk if it is not all there or its checksum is wrong."""
        end, size = int(self._ends[i]), int(self._index["bytes"][i])
        if end > len(self._data):
            raise CorruptChunk(f"cut short: {len(self._data)} of {self.total_bytes} bytes")
        part = self._data[end - size : end]
        if xxhash.xxh3_64_intdigest(part) != int(self._index["xxh3"][i]):
            raise CorruptChunk(f"checksum of part {i} is wrong")
        return part

    def records(self) -> np.ndarray:
        """uint8 `[sections, channels, 4]`."""
        h = self.header
        frame, size = self.part(0), h.sections * h.channels * RECORD_BYTES
        try:
            if zstandard.frame_content_size(frame) != size:
                raise CorruptChunk("the records are not of the size that the header gives")
            planes = zstandard.ZstdDecompressor().decompress(frame, max_output_size=size)
        except zstandard.ZstdError as error:
            raise CorruptChunk(f"records: {error}") from None
        shape = RECORD_BYTES, h.sections, h.channels
        return np.ascontiguousarray(
            np.frombuffer(planes, np.uint8).reshape(shape).transpose(1, 2, 0)
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """By name. Raises CorruptChunk."""
        found = {}
        for i, info in enumerate(self.header.arrays, 1):
            part, size = self.part(i), math.prod(info.shape) * np.dtype(info.dtype).itemsize
            if size < 0 or size + -size % ALIGN != len(part):
                raise CorruptChunk(f"array {info.name} is not of the size that the header gives")
            found[info.name] = np.frombuffer(part[:size], info.dtype).reshape(info.shape)
        return found

    def sections(self, first_layer: int, last_layer: int) -> tuple[np.ndarray, np.ndarray]:
        """The bytes of these layers' sections, checked, and where each ends in them."""
        first = self._first_section + 2 * first_layer
        last = self._first_section + 2 * last_layer
        for i in range(first, last):
            self.part(i)
        begin = int(self._ends[first - 1])
        data = np.frombuffer(self._data[begin : int(self._ends[last - 1])], np.uint8)
        return data, self._ends[first:last] - begin

    @property
    def _first_section(self) -> int:
        return 1 + len(self.header.arrays)


def pack(header: Header, encoded: Encoded, arrays: dict[str, np.ndarray] | None = None) -> bytes:
    """The whole chunk as bytes."""
    arrays = arrays or {}
    infos = tuple(
        ArrayInfo(name=name, dtype=str(array.dtype), shape=array.shape)
        for name, array in arrays.items()
    )
    header = header.model_copy(update={"arrays": infos})
    planes = np.ascontiguousarray(encoded.records.transpose(2, 0, 1))
    parts = [
        zstandard.ZstdCompressor(level=3).compress(planes.tobytes()),
        *(np.ascontiguousarray(array).tobytes() for array in arrays.values()),
        *encoded.sections,
    ]
    parts[:-1] = [*(_padded(p) for p in parts[: 1 + len(arrays)]), *parts[1 + len(arrays) : -1]]
    index = np.array([(len(p), xxhash.xxh3_64_intdigest(p)) for p in parts], INDEX).tobytes()
    text = json.dumps(header.model_dump(exclude_defaults=True), separators=(",", ":")).encode()
    text += b" " * (-(PREFIX.size + len(text) + len(index)) % ALIGN)
    total = PREFIX.size + len(text) + len(index) + sum(map(len, parts))
    return b"".join([_prefix(text, index, len(parts), total), text, index, *parts])


def parse(data: bytes | memoryview, max_raw_bytes: int = 1 << 32) -> Container:
    """The container that starts at `data`, which may still lack sections at the end.

    Raises CorruptChunk (WrongVersion) for anything that `pack` did not write, and for chunks that
    would decode to more than `max_raw_bytes`.
    """
    view = memoryview(data).cast("B")
    if len(view) < PREFIX.size:
        raise CorruptChunk("too short for a container")
    magic, version, zero, header_bytes, parts, total, _ = PREFIX.unpack(view[: PREFIX.size])
    if magic != MAGIC:
        raise CorruptChunk("not a KV container")
    if version != VERSION:
        raise WrongVersion(f"container version {version}, this reads {VERSION}")
    if header_bytes > MAX_HEADER_BYTES or parts > 1 + MAX_ARRAYS + 2 * MAX_LAYERS or zero:
        raise CorruptChunk("header out of bounds")
    start = PREFIX.size + header_bytes + parts * INDEX.itemsize
    if len(view) < start:
        raise CorruptChunk("cut short in the header")
    text, index_bytes = (
        view[PREFIX.size : PREFIX.size + header_bytes],
        view[start - parts * 12 : start],
    )
    if bytes(view[: PREFIX.size]) != _prefix(text, index_bytes, parts, total):
        raise CorruptChunk("checksum of the header is wrong")
    try:
        header = Header.model_validate_json(bytes(text))
    except ValidationError as error:
        raise CorruptChunk(f"header: {error.errors()[0]['msg']}") from None
    if header.codebook != CODEBOOK_VERSION:
        raise WrongVersion(f"codebook {header.codebook}, this reads {CODEBOOK_VERSION}")
    if parts != 1 + len(header.arrays) + header.sections:
        raise CorruptChunk("number of parts does not fit the header")
    if header.channels > MAX_CHANNELS or header.raw_bytes > max_raw_bytes:
        raise CorruptChunk(f"{header.raw_bytes} bytes decoded: more than allowed")
    index = np.frombuffer(index_bytes, INDEX)
    container = Container(header, index, view, start)
    if container.total_bytes != total or len(view) > total:
        raise CorruptChunk("length does not fit the index")
    return container


def _prefix(text: Any, index: Any, parts: int, total: int) -> bytes:
    fields: Sequence[Any] = (MAGIC, VERSION, 0, len(text), parts, total)
    digest = xxhash.xxh3_64(PREFIX.pack(*fields, 0))
    digest.update(text)
    digest.update(index)
    return PREFIX.pack(*fields, digest.intdigest())


def _padded(part: bytes) -> bytes:
    return part + b"\0" * (-len(part) % ALIGN)
