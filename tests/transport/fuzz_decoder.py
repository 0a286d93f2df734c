"""Mutated containers, as many as asked for: python tests/transport/fuzz_decoder.py 100000

Half of them through the checksums, half below them: with checksums made right again, so that the
decoder itself sees the damage. No outcome but CorruptChunk or an array of the right shape counts
as sound; through the checksums not even the latter, unless nothing was changed.
"""

import sys
from collections import Counter

import numpy as np

from vllm_kvcompress.transport import profile
from vllm_kvcompress.transport.chunks import ChunkCodec
from vllm_kvcompress.transport.codec import CorruptChunk, Encoded, as_bits
from vllm_kvcompress.transport.container import Header, pack, parse

LAYERS, HEADS, SIZE = 2, 2, 8
DTYPES = ("bfloat16", "float16", "float32")


def chunks() -> list[tuple[ChunkCodec, bytes]]:
    """Every dtype and level, with and without a profile."""
    rng, made = np.random.default_rng(0), []
    for dtype in DTYPES:
        x = rng.normal(size=(LAYERS, 2, 64, HEADS * SIZE))
        x[..., ::5] = np.cumsum(x[..., ::5] * 0.1, axis=2)
        kv = as_bits(x * (1 + 30 * (rng.random(x.shape) < 0.01)), dtype)
        for codec in (ChunkCodec(), ChunkCodec(profile.build(kv, dtype))):
            made += [(codec, codec.encode(kv, dtype, n, heads=HEADS)) for n in (1, 2, 3, 4)]
    return made


def mutate(rng: np.random.Generator, data: bytes) -> bytes:
    """Flip bits, write random bytes, cut out, put in, or cut off."""
    changed = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        at = int(rng.integers(0, max(len(changed), 1)))
        match rng.integers(0, 5):
            case 0 if changed:
                changed[at] ^= 1 << rng.integers(0, 8)
            case 1:
                changed[at : at + 4] = rng.bytes(4)
            case 2:
                del changed[at : at + int(rng.integers(1, 40))]
            case 3:
                changed[at:at] = rng.bytes(int(rng.integers(1, 40)))
            case _:
                del changed[at:]
    return bytes(changed)


def below_the_checksums(rng: np.random.Generator, data: bytes) -> bytes:
    """The container with records or sections mutated, and all its checksums right."""
    container = parse(data)
    header = container.header
    body, ends = container.sections(0, header.layers)
    sections = [bytes(part) for part in np.split(body, np.asarray(ends)[:-1])]
    records = container.records().copy()
    if rng.random() < 0.5:
        at = rng.integers(0, records.size, size=3)
        records.reshape(-1)[at] = rng.integers(0, 256, size=3)
    else:
        i = int(rng.integers(0, len(sections)))
        sections[i] = mutate(rng, sections[i])
    return pack(Header(**header.model_dump()), Encoded(records, sections))


def fuzz(mutations: int, seed: int = 0) -> Counter[str]:
    """Outcomes by name. Raises AssertionError for one that is not sound."""
    rng, made, outcomes = np.random.default_rng(seed), chunks(), Counter[str]()
    for i in range(mutations):
        codec, data = made[i % len(made)]
        guarded = i // len(made) % 2 == 0
        changed = mutate(rng, data) if guarded else below_the_checksums(rng, data)
        try:
            out = codec.decode(changed)
        except CorruptChunk:
            outcomes["refused"] += 1
            continue
        assert not guarded or changed == data, "a change went through the checksums"
        assert out.shape == (LAYERS, 2, 64, HEADS * SIZE)
        outcomes["unchanged" if guarded else "decoded"] += 1
    return outcomes


if __name__ == "__main__":
    print(dict(fuzz(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)))
