"""The codec's promises: exact, bounded, the same bytes everywhere, close to the entropy."""

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transport import reference, samples

from vllm_kvcompress.transport import profile
from vllm_kvcompress.transport.codec import (
    ITEM_BYTES,
    CorruptChunk,
    SectionCodec,
    Tables,
    as_bits,
    as_floats,
    codebook,
)
from vllm_kvcompress.transport.levels import EXACT, FIXED_STEP, PER_TOKEN, Plan

DTYPES = ("bfloat16", "float16", "float32")
QUANTISERS = (
    (FIXED_STEP, 0.6),
    (FIXED_STEP, 0.02),
    (PER_TOKEN, 15.0),
    (PER_TOKEN, 5.0),
    (EXACT, 0),
)


def asked(quantiser: int, parameter: float, sections: int) -> Plan:
    return Plan(np.full(sections, quantiser, np.uint8), np.full(sections, parameter, np.float32))


def round_trip(values, dtype, quantiser, parameter, tables=None, isa="", threads=1):
    """(encoded, decoded) of a KV array."""
    codec = SectionCodec(threads, isa)
    encoded = codec.encode(values, dtype, asked(quantiser, parameter, len(values)), tables)
    data = np.frombuffer(b"".join(encoded.sections), np.uint8)
    ends = np.cumsum([len(s) for s in encoded.sections])
    out = np.empty_like(values)
    codec.decode(data, ends, encoded.records, dtype, out, tables)
    return encoded, out


@pytest.mark.parametrize("isa", samples.INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("quantiser", "parameter"), QUANTISERS)
@pytest.mark.parametrize("make", samples.ALL, ids=lambda make: make.__name__)
def test_bytes_are_those_of_the_slow_reference(isa, dtype, quantiser, parameter, make):
    values = samples.bits(make, dtype, 2, 75, 9)
    encoded, _ = round_trip(values, dtype, quantiser, parameter, isa=isa)
    for i, section in enumerate(values):
        records, body = reference.encode_section(section, dtype, quantiser, parameter)
        np.testing.assert_array_equal(encoded.records[i], records)
        assert encoded.sections[i] == body


@pytest.mark.parametrize("isa", samples.INSTRUCTION_SETS)
@pytest.mark.parametrize("tokens", [255, 256, 257, 1024])
def test_bytes_with_32_and_64_lanes_are_those_of_the_slow_reference(isa, tokens):
    values = samples.bits(samples.gaussian, "bfloat16", 1, tokens, 260 if tokens < 1024 else 128)
    encoded, _ = round_trip(values, "bfloat16", FIXED_STEP, 0.5, isa=isa)
    _, body = reference.encode_section(values[0], "bfloat16", FIXED_STEP, 0.5)
    assert encoded.sections[0] == body


@pytest.mark.parametrize("isa", samples.INSTRUCTION_SETS)
def test_bytes_with_a_profile_are_those_of_the_slow_reference(isa):
    values = samples.bits(samples.gaussian, "bfloat16", 2, 512, 12)
    level = profile.build(values.reshape(1, 2, 512, 12), "bfloat16", 3).levels[2]
    part = np.ascontiguousarray(values[:, 100:180])
    codec = SectionCodec(isa=isa)
    wanted = asked(FIXED_STEP, 0.5, 2)
    encoded = codec.encode(part, "bfloat16", wanted, level.tables)
    assert (encoded.records[..., 0] == 0).any(), "no channel uses the profile"
    for i, section in enumerate(part):
        tables = level.tables.frequencies[i], level.tables.channels[i]
        records, body = reference.encode_section(section, "bfloat16", FIXED_STEP, 0.5, tables)
        np.testing.assert_array_equal(encoded.records[i], records)
        assert encoded.sections[i] == body


@settings(max_examples=60)
@given(
    tokens=st.integers(1, 300),
    channels=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    make=st.sampled_from(samples.ALL),
    seed=st.integers(0, 1 << 30),
)
def test_lossless_is_exact_for_every_shape_and_dtype(tokens, channels, dtype, make, seed):
    values = samples.bits(make, dtype, 1, tokens, channels, seed=seed)
    _, out = round_trip(values, dtype, EXACT, 0)
    np.testing.assert_array_equal(out, values)


@settings(max_examples=30)
@given(dtype=st.sampled_from(DTYPES), seed=st.integers(0, 1 << 30))
def test_lossless_is_exact_for_any_bits(dtype, seed):
    """NaNs with payloads, infinities, subnormals, both zeros."""
    item = np.uint32 if dtype == "float32" else np.uint16
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 1 << 8 * ITEM_BYTES[dtype], size=(1, 40, 11)).astype(item)
    values = raw.view(np.float32) if dtype == "float32" else raw
    _, out = round_trip(values, dtype, EXACT, 0)
    np.testing.assert_array_equal(out.view(item), raw)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 31, 255, 256, 257])
@pytest.mark.parametrize("make", samples.ALL, ids=lambda make: make.__name__)
def test_lossy_error_is_at_most_half_a_step(dtype, tokens, make):
    values = samples.bits(make, dtype, 2, tokens, 40)
    x = as_floats(values, dtype).astype(np.float64)
    rounding = {"bfloat16": 2**-8, "float16": 2**-11, "float32": 2**-23}[dtype]
    _, out = round_trip(values, dtype, FIXED_STEP, 0.5)
    step = 0.5 * np.sqrt((x**2).mean(axis=(1, 2), keepdims=True))
    assert (np.abs(as_floats(out, dtype) - x) <= 0.501 * step + rounding * np.abs(x)).all()
    _, out = round_trip(values, dtype, PER_TOKEN, 7)
    bound = np.abs(x).max(axis=2, keepdims=True) / 14
    assert (np.abs(as_floats(out, dtype) - x) <= 1.001 * bound + rounding * np.abs(x)).all()


@pytest.mark.parametrize(
    ("bins", "decoded"),
    [(32, [0, 1, -2, 3, -0.6, 0.2]), (16, [0, 0.8571, -2.1429, 3, -0.4286, 0.4286])],
)
def test_published_quantiser_gives_the_worked_example(bins, decoded):
    values = np.array([[[0, 1, -2, 3, -0.5, 0.26]]], np.float32)
    _, out = round_trip(values, "float32", PER_TOKEN, bins // 2 - 1)
    np.testing.assert_allclose(out[0, 0], decoded, atol=5e-5)


def test_a_vector_of_zeros_decodes_to_zeros():
    values = np.zeros((1, 3, 8), np.float32)
    values[0, 1] = 5.0
    for quantiser, parameter in QUANTISERS[:3]:
        _, out = round_trip(values, "float32", quantiser, parameter)
        assert (out[0, 0] == 0).all() and np.isfinite(out).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strange", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("quantiser", "parameter"), [(FIXED_STEP, 0.5), (PER_TOKEN, 15)])
def test_what_a_step_cannot_hold_travels_losslessly(dtype, strange, quantiser, parameter):
    x = np.random.default_rng(0).normal(size=(2, 20, 16))
    values = as_bits(x, dtype)
    bits = {"bfloat16": 0x7F80, "float16": 0x7C00}.get(dtype, 0) + np.isnan(strange)
    values[1, 7, 3] = strange if dtype == "float32" else bits
    _, out = round_trip(values, dtype, quantiser, parameter)
    np.testing.assert_array_equal(out[1], values[1])
    assert (out[0] != values[0]).any(), "the other section stays lossy"


def test_zero_is_coded_exactly_by_the_published_quantiser():
    values = np.random.default_rng(1).normal(size=(1, 60, 16)).astype(np.float32)
    values[:, ::3, ::2] = 0
    _, out = round_trip(values, "float32", PER_TOKEN, 5)
    assert (out[:, ::3, ::2] == 0).all()


def payload_bits_and_bounds(values, dtype, quantiser, parameter):
    """(bits of states and words, cross-entropy under the tables used, entropy of each channel)."""
    encoded, _ = round_trip(values, dtype, quantiser, parameter)
    book = codebook()["frequencies"][0].astype(float)
    paid = cross = own = 0.0
    for section, body, records in zip(values, encoded.sections, encoded.records, strict=True):
        words, raw, escapes, own, lanes, _, divisor, _ = struct.unpack_from("<IIIHBBHH", body)
        assert not own
        (step,) = struct.unpack_from("<f", body, 20 + 4 * lanes + 2 * words + 2 * escapes + raw)
        paid += 32 * lanes + 16 * words
        x = as_floats(section, dtype)
        most = np.abs(x).max(axis=1, keepdims=True)
        scale = most / divisor if quantiser == PER_TOKEN else step
        q = np.rint(x / scale).astype(int)
        centres = records[:, 2:].copy().view("<i2").ravel().tolist()
        for c, (table, flags, centre) in enumerate(
            zip(*records.T[:2].tolist(), centres, strict=True)
        ):
            v = np.diff(q[:, c], prepend=centre) if flags & 128 else q[:, c] - centre
            assert not flags & 15, "wider than this bound is meant for"
            symbols = np.where(np.abs(v) <= 15, v + 16, 0)
            p = book[table] / 4096
            symbols = np.where(p[symbols] > 0, symbols, 0)
            cross -= np.log2(p[symbols]).sum()
            counts = np.bincount(symbols, minlength=32)
            seen = counts[counts > 0] / len(symbols)
            own -= (seen * np.log2(seen)).sum() * len(symbols)
    return paid, cross, own


@pytest.mark.parametrize("channels", [128, 1024])
def test_payload_is_within_one_percent_of_the_cross_entropy(channels):
    x = np.random.default_rng(0).normal(size=(1, 256, channels))
    for quantiser, parameter in ((FIXED_STEP, 0.5), (PER_TOKEN, 7)):
        paid, cross, _ = payload_bits_and_bounds(
            as_bits(x, "bfloat16"), "bfloat16", quantiser, parameter
        )
        assert cross < paid <= 1.01 * cross


def test_gaussian_chunk_meets_the_published_entropy_bound():
    """64 channels x 256 tokens, 16 bins: at most 3 % over the empirical entropy."""
    x = np.random.default_rng(0).normal(size=(1, 256, 64))
    paid, _, own = payload_bits_and_bounds(as_bits(x, "bfloat16"), "bfloat16", PER_TOKEN, 7)
    assert paid <= 1.03 * own


@pytest.mark.parametrize(("half", "bits"), [(7, 2.93), (15, 3.98)])
def test_unit_gaussian_costs_the_published_bits(half, bits):
    """A token's maximum over a few thousand channels is 3.8."""
    x = as_bits(np.random.default_rng(0).normal(size=(1, 1024, 128)), "bfloat16")
    paid, _, _ = payload_bits_and_bounds(x, "bfloat16", FIXED_STEP, 3.8 / half)
    assert paid / x.size == pytest.approx(bits, abs=0.1)


def test_neighbours_alike_are_coded_as_differences_and_cost_less():
    values = samples.bits(samples.drifting, "float32", 1, 256, 32)
    shuffled = values[:, np.random.default_rng(0).permutation(256)]
    near, out = round_trip(values, "float32", FIXED_STEP, 0.1)
    far, _ = round_trip(shuffled, "float32", FIXED_STEP, 0.1)
    assert (near.records[0, :, 1] >= 128).all()
    assert not (far.records[0, :, 1] >= 128).any()
    assert len(near.sections[0]) < 0.7 * len(far.sections[0])
    step = 0.1 * np.sqrt((values**2).mean())
    error = np.abs(out - values).max(axis=(0, 2))
    assert error[-1] <= 0.501 * step, "differences of what is decoded do not drift"


def test_a_chunk_far_from_the_codebook_brings_its_own_tables():
    values = samples.bits(samples.two_peaks, "bfloat16", 1, 1500, 8)
    encoded, _ = round_trip(values, "bfloat16", FIXED_STEP, 0.3)
    assert (encoded.records[..., 0] == 255).any()


@pytest.mark.parametrize("isa", samples.INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_head_has_a_step_of_its_own(isa, dtype):
    """A quiet head beside a loud one is coded as well as alone; the same bytes as the reference."""
    x = np.random.default_rng(0).normal(size=(1, 80, 40)) * np.repeat([1, 50, 0.02, 1], 10)
    values = as_bits(x, dtype)
    codec = SectionCodec(isa=isa)
    encoded = codec.encode(values, dtype, asked(FIXED_STEP, 0.4, 1), heads=4)
    records, body = reference.encode_section(values[0], dtype, FIXED_STEP, 0.4, heads=4)
    assert encoded.sections[0] == body
    np.testing.assert_array_equal(encoded.records[0], records)
    out = np.empty_like(values)
    data = np.frombuffer(body, np.uint8)
    codec.decode(data, [len(data)], encoded.records, dtype, out)
    error = (as_floats(out, dtype) - as_floats(values, dtype)).reshape(80, 4, 10)
    rms = np.sqrt((error**2).mean(axis=(0, 2))) / [1, 50, 0.02, 1]
    np.testing.assert_allclose(rms, 0.4 / np.sqrt(12), rtol=0.1)


def test_every_thread_count_gives_the_same_bytes():
    values = samples.bits(samples.gaussian, "bfloat16", 6, 64, 24)
    one, _ = round_trip(values, "bfloat16", FIXED_STEP, 0.5, threads=1)
    four, _ = round_trip(values, "bfloat16", FIXED_STEP, 0.5, threads=4)
    assert one.sections == four.sections


def test_wrong_tables_are_refused():
    values = samples.bits(samples.gaussian, "bfloat16", 1, 16, 8)
    tables = Tables(np.full((1, 8, 32), 127, np.uint16), np.zeros((1, 8, 4), np.uint8))
    with pytest.raises(ValueError, match="add up"):
        SectionCodec().encode(values, "bfloat16", asked(FIXED_STEP, 0.5, 1), tables)


@pytest.mark.parametrize("isa", samples.INSTRUCTION_SETS)
@pytest.mark.parametrize(("quantiser", "parameter"), QUANTISERS)
def test_changed_section_bytes_never_crash_the_decoder(isa, quantiser, parameter):
    """Below the checksums: any bytes either decode to something or are refused."""
    values = samples.bits(samples.gaussian, "bfloat16", 1, 90, 20)
    codec = SectionCodec(isa=isa)
    encoded = codec.encode(values, "bfloat16", asked(quantiser, parameter, 1))
    rng, out, refused = np.random.default_rng(7), np.empty_like(values), 0
    for _ in range(400):
        data, records = samples.damaged(rng, encoded.sections[0], encoded.records)
        try:
            codec.decode(data, [len(data)], records, "bfloat16", out)
        except CorruptChunk:
            refused += 1
    assert refused > 100
