"""A chunk's bytes say all there is to know, and anything wrong with them is noticed."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transport import samples
from transport.fuzz_decoder import fuzz

from vllm_kvcompress.transport import profile
from vllm_kvcompress.transport.chunks import ChunkCodec, WrongProfile
from vllm_kvcompress.transport.codec import CorruptChunk, SectionCodec
from vllm_kvcompress.transport.container import PREFIX, Header, WrongVersion, pack, parse
from vllm_kvcompress.transport.levels import LEVELS, STEPS, Quantiser, plan

LAYERS, HEADS, HEAD_SIZE = 3, 2, 8


def kv(dtype="bfloat16", tokens=48, seed=0):
    bits = samples.bits(samples.gaussian, dtype, 2 * LAYERS, tokens, HEADS * HEAD_SIZE, seed=seed)
    return bits.reshape(LAYERS, 2, tokens, HEADS * HEAD_SIZE)


@pytest.fixture(scope="module")
def chunk() -> bytes:
    return ChunkCodec().encode(kv(), "bfloat16", 2, heads=HEADS, key="k")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("quantiser", Quantiser)
@pytest.mark.parametrize("level", LEVELS[1:])
def test_decoding_needs_nothing_but_the_bytes(dtype, quantiser, level):
    values = kv(dtype)
    data = ChunkCodec(quantiser=quantiser).encode(values, dtype, level, heads=HEADS)
    header = parse(data).header
    assert (header.layers, header.tokens, header.heads, header.head_size) == (3, 48, 2, 8)
    assert (header.dtype, header.level) == (dtype, level)
    out = ChunkCodec().decode(data)
    assert out.shape == values.shape
    assert (out == values).all() == (level == 4)


def test_higher_levels_are_larger_and_closer():
    values = kv("float32", tokens=256)
    chunks = [ChunkCodec().encode(values, "float32", level, heads=HEADS) for level in LEVELS[1:]]
    errors = [float(((ChunkCodec().decode(c) - values) ** 2).mean()) for c in chunks]
    assert sorted(map(len, chunks)) == [len(c) for c in chunks]
    assert sorted(errors, reverse=True) == errors


def test_a_layer_can_be_decoded_before_the_rest_has_come(chunk):
    codec = ChunkCodec()
    whole = codec.decode(chunk)
    for layer in range(LAYERS):
        early = chunk[: parse(chunk).bytes_until_layer(layer)]
        container = parse(early)
        out = codec.empty(container.header)
        codec.decode_layers(container, 0, layer + 1, out)
        np.testing.assert_array_equal(out[: layer + 1], whole[: layer + 1])
        if layer < LAYERS - 1:
            with pytest.raises(CorruptChunk, match="cut short"):
                codec.decode_layers(container, layer + 1, layer + 2, out)


def test_chunks_are_independent_and_the_tail_is_kept():
    """Oracle 12: a chunk alone gives what it gives among others; a short last one is whole."""
    values = kv("float32", tokens=100)
    parts = [values[:, :, a : a + 32] for a in range(0, 100, 32)]
    codec = ChunkCodec()
    chunks = [codec.encode(np.ascontiguousarray(p), "float32", 4, heads=HEADS) for p in parts]
    alone = codec.decode(chunks[3])
    assert alone.shape[2] == 4
    np.testing.assert_array_equal(np.concatenate([codec.decode(c) for c in chunks], 2), values)
    np.testing.assert_array_equal(alone, values[:, :, 96:])


def test_arrays_travel_beside_the_sections():
    """A compressed arena: how many pages each head has, and which positions they hold."""
    values = kv().reshape(2 * LAYERS, 48, -1)
    encoded = SectionCodec().encode(values, "bfloat16", plan(2, LAYERS))
    header = Header(layers=3, tokens=48, heads=2, head_size=8, dtype="bfloat16", level=2)
    pages = np.arange(9, dtype=np.int32).reshape(3, 3)
    positions = np.arange(48, dtype=np.int64)
    data = pack(header, encoded, {"pages": pages, "positions": positions})
    found = parse(data).arrays()
    np.testing.assert_array_equal(found["pages"], pages)
    np.testing.assert_array_equal(found["positions"], positions)
    np.testing.assert_array_equal(
        ChunkCodec().decode(data),
        ChunkCodec().decode(pack(header, encoded)),
    )


def test_every_single_byte_is_guarded(chunk):
    codec = ChunkCodec()
    for at in range(len(chunk)):
        changed = bytearray(chunk)
        changed[at] ^= 1 << at % 8
        with pytest.raises(CorruptChunk):
            codec.decode(bytes(changed))


@settings(max_examples=300)
@given(data=st.data())
def test_mutations_are_always_noticed(chunk, data):
    start = data.draw(st.integers(0, len(chunk) - 1))
    length = data.draw(st.integers(0, 40))
    patch = data.draw(st.binary(max_size=40))
    changed = chunk[:start] + patch + chunk[start + length :]
    if changed != chunk:
        with pytest.raises(CorruptChunk):
            ChunkCodec().decode(changed)


def test_every_truncation_is_noticed(chunk):
    codec = ChunkCodec()
    for end in range(len(chunk)):
        with pytest.raises(CorruptChunk):
            codec.decode(chunk[:end])


def resigned(chunk: bytes, change) -> bytes:
    """The chunk with its header's JSON changed and the prefix made right again."""
    from vllm_kvcompress.transport import container

    _, _, _, size, parts, total, _ = PREFIX.unpack(chunk[: PREFIX.size])
    text = chunk[PREFIX.size : PREFIX.size + size]
    index = chunk[PREFIX.size + size : PREFIX.size + size + 12 * parts]
    fields = json.loads(text)
    change(fields)
    new = json.dumps(fields).encode()
    prefix = container._prefix(new, index, parts, total + len(new) - len(text))
    return prefix + new + chunk[PREFIX.size + size :]


@pytest.mark.parametrize(
    "change",
    [
        {"layers": 4},
        {"layers": 10**9},
        {"tokens": 32767},
        {"tokens": 49},
        {"tokens": 0},
        {"heads": 65535, "head_size": 65535},
        {"heads": 1},
        {"dtype": "object"},
        {"level": 9},
        {"surprise": 1},
        {"codebook": 2},
        {"arrays": [{"name": "a", "dtype": "int32", "shape": [1 << 60]}]},
    ],
    ids=str,
)
def test_a_lying_header_is_refused_before_anything_is_allocated(chunk, change):
    with pytest.raises(CorruptChunk):
        ChunkCodec().decode(resigned(chunk, lambda fields: fields.update(change)))


def test_another_version_is_refused_as_such(chunk):
    old = chunk[:4] + (9).to_bytes(2, "little") + chunk[6:]
    with pytest.raises(WrongVersion, match="version 9"):
        parse(old)


def test_more_than_the_reader_allows_is_refused(chunk):
    with pytest.raises(CorruptChunk, match="more than allowed"):
        parse(chunk, max_raw_bytes=100)


def test_a_profile_makes_chunks_smaller_and_is_needed_to_read_them():
    values = kv(tokens=1024)
    offline = profile.build(values, "bfloat16", HEADS)
    part = np.ascontiguousarray(values[:, :, :64])
    data = ChunkCodec(offline).encode(part, "bfloat16", 2, heads=HEADS)
    assert len(data) < len(ChunkCodec().encode(part, "bfloat16", 2, heads=HEADS))
    out = ChunkCodec(profile.Profile.from_bytes(offline.to_bytes())).decode(data)
    x = samples_as_floats(part)
    by_head = (LAYERS, 2, -1, HEADS, HEAD_SIZE)
    power = (samples_as_floats(values).reshape(by_head) ** 2).mean(axis=(2, 4), keepdims=True)
    error = np.abs(samples_as_floats(out) - x).reshape(by_head)
    allowed = 0.51 * max(STEPS[2]) * np.sqrt(power) + np.abs(x).reshape(by_head) / 256
    assert (error <= allowed).all()
    with pytest.raises(WrongProfile):
        ChunkCodec().decode(data)
    with pytest.raises(WrongProfile):
        ChunkCodec(profile.build(kv(tokens=512, seed=1), "bfloat16", HEADS)).decode(data)


def samples_as_floats(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def test_a_profile_of_another_shape_or_dtype_is_left_aside():
    offline = profile.build(kv("float32", tokens=64), "float32", HEADS)
    data = ChunkCodec(offline).encode(kv(), "bfloat16", 2, heads=HEADS)
    np.testing.assert_array_equal(ChunkCodec().decode(data), ChunkCodec(offline).decode(data))


@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_profile_tables_add_up_and_cover_what_was_seen(level):
    tables = profile.build(kv(tokens=300), "bfloat16", HEADS).levels[level].tables
    sums = tables.frequencies.astype(int).sum(axis=2)
    assert (sums == 4096).all()
    assert (tables.frequencies[..., 0] >= 1).all()
    assert (tables.frequencies < 4096).all()


def test_what_is_no_profile_is_refused(tmp_path):
    good = profile.build(kv(), "bfloat16", HEADS).to_bytes()
    for bad in (b"", b"\0" * 64, good[:200], good[:-1]):
        with pytest.raises(ValueError, match="not a profile"):
            profile.Profile.from_bytes(bad)
    changed = bytearray(good)
    changed[-40] ^= 0xFF  # a table's number
    (tmp_path / "p").write_bytes(changed)
    try:
        profile.Profile.load(tmp_path / "p")
    except ValueError as error:
        assert "not a profile" in str(error)


def test_mutations_above_and_below_the_checksums_are_refused_or_harmless():
    outcomes = fuzz(2000)
    assert sum(outcomes.values()) == 2000
    assert outcomes["refused"] > 1300
