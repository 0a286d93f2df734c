"""A chunk of KV cache to a container and back: levels, profile, codec and container together."""

from typing import Any

import numpy as np

from vllm_kvcompress.transport.codec import CorruptChunk, SectionCodec, Sections
from vllm_kvcompress.transport.container import Container, Header, pack, parse
from vllm_kvcompress.transport.levels import Quantiser, plan
from vllm_kvcompress.transport.profile import Profile


class WrongProfile(CorruptChunk):
    """The chunk was coded with another profile than the one at hand."""


class ChunkCodec:
    """Encodes `[layers, 2, tokens, heads * head_size]` arrays of one model.

    `profile` is used where it makes a channel smaller; decoding such chunks needs the same one.
    `sections` codes in the place of a `SectionCodec` with these `threads` and `isa`; arrays are
    then what that one takes. Raises CodecMissing.
    """

    def __init__(
        self,
        profile: Profile | None = None,
        quantiser: Quantiser = Quantiser.FIXED,
        threads: int = 1,
        isa: str = "",
        sections: Sections | None = None,
    ) -> None:
        self.profile, self.quantiser = profile, quantiser
        self.sections = sections or SectionCodec(threads, isa)

    def encode(self, kv: Any, dtype: str, level: int, *, heads: int, key: str = "") -> bytes:
        """One container. `kv` holds bits (uint16) for the 16-bit types, see codec.py."""
        layers, two, tokens, channels = kv.shape
        if two != 2 or channels % heads:
            raise ValueError(f"shape {kv.shape}: must be [layers, 2, tokens, {heads} x head size]")
        wanted = plan(level, layers, self.quantiser)
        relative, tables, digest, at_level = True, None, "", None
        if self.profile is not None:
            at_level = self.profile.at(level, self.quantiser, kv.shape, dtype, heads)
            digest = self.profile.digest if at_level else ""
        if at_level is not None:
            tables = at_level.tables
            if at_level.steps is not None:
                wanted, relative = wanted._replace(parameters=at_level.steps), False
        values = kv.reshape(2 * layers, tokens, channels)
        encoded = self.sections.encode(
            values, dtype, wanted, tables, heads=heads, relative=relative
        )
        header = Header(
            layers=layers,
            tokens=tokens,
            heads=heads,
            head_size=channels // heads,
            dtype=dtype,
            level=level,
            key=key,
            profile=digest,
        )
        return pack(header, encoded)

    def decode(self, data: bytes | memoryview) -> np.ndarray:
        """The whole chunk, `[layers, 2, tokens, channels]`. Raises CorruptChunk."""
        container = parse(data)
        out = self.empty(container.header)
        self.decode_layers(container, 0, container.header.layers, out)
        return out

    def empty(self, header: Header) -> np.ndarray:
        item = np.float32 if header.dtype == "float32" else np.uint16
        return np.empty((header.layers, 2, header.tokens, header.channels), item)

    def decode_layers(self, container: Container, first: int, last: int, out: Any) -> None:
        """Fill `out[first:last]`, as soon as these layers' bytes are there."""
        header, tables = container.header, None
        if header.profile:
            if self.profile is None or self.profile.digest != header.profile:
                raise WrongProfile(f"coded with profile {header.profile}")
            at_level = self.profile.at(
                header.level, self.quantiser, out.shape, header.dtype, header.heads
            )
            if at_level is None:
                raise WrongProfile(f"profile {header.profile} has no such level or shape")
            tables = at_level.tables
            tables = type(tables)(*(part[2 * first : 2 * last] for part in tables))
        data, ends = container.sections(first, last)
        records = container.records()[2 * first : 2 * last]
        view = out[first:last].reshape(2 * (last - first), header.tokens, header.channels)
        self.sections.decode(data, ends, records, header.dtype, view, tables)
