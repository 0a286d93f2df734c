"""The codec's benchmarks measure what they say, on small inputs."""

import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from transport import reference

from vllm_kvcompress.bench import codec as speed
from vllm_kvcompress.bench import codec_sizes
from vllm_kvcompress.bench.engine import MODEL
from vllm_kvcompress.bench.lmcache_process import Lmcache, LmcacheFailed, default_bins
from vllm_kvcompress.transport.chunks import ChunkCodec
from vllm_kvcompress.transport.codec import CodecMissing, SectionCodec, as_floats, instruction_sets
from vllm_kvcompress.transport.levels import DEFAULT_LEVEL, plan
from vllm_kvcompress.transport.sample import sample

try:
    instruction_sets()
except CodecMissing as missing:
    pytest.skip(str(missing), allow_module_level=True)


@pytest.fixture(scope="module")
def kv():
    return speed.synthetic(2, 96, 256)


def test_synthetic_kv_has_the_structure_it_promises(kv):
    x = as_floats(kv, "bfloat16").astype(np.float64)
    assert x.shape == (2, 2, 96, 256)
    values = x[:, 1] - x[:, 1].mean(axis=1, keepdims=True)
    neighbours = (values[:, 1:] * values[:, :-1]).sum() / (values**2).sum()
    assert neighbours == pytest.approx(0.6, abs=0.1)
    loud = np.abs(x[:, 0].mean(axis=1)) > 10
    assert 0 < loud.mean() < 0.06, "a few outlier channels, in K"
    assert not (np.abs(x[:, 1].mean(axis=1)) > 10).any()


def given(kv) -> speed.Input:
    return speed.Input("small", kv, 2)


def test_our_bits_are_those_of_the_containers(kv):
    result = speed.Measured("level 2", 1)
    turn = speed.ours(given(kv), 64, 2, "portable", 1)
    for _ in range(2):
        result.add(kv, turn())
    parts = [np.ascontiguousarray(kv[:, :, a:b]) for a, b in ((0, 64), (64, 96))]
    size = sum(len(ChunkCodec().encode(part, "bfloat16", 2, heads=2)) for part in parts)
    assert result.bits == pytest.approx(8 * size / kv.size)
    assert len(result.encode_mb_s) == len(result.decode_mb_s) == 2
    assert 0 < result.rms_error < 0.3
    lossless = speed.ours(given(kv), 64, 4, "portable", 1)()
    np.testing.assert_array_equal(lossless.back, kv)


def test_zstd_gives_the_same_bytes_back(kv):
    turn = speed.zstd_of_bytes(given(kv))()
    np.testing.assert_array_equal(turn.back, kv)
    assert kv.nbytes / 4 < turn.bytes < kv.nbytes


def test_every_codec_takes_its_turn_in_every_round(kv):
    results = speed.speeds(given(kv), 64, threads=2, rounds=2, lmcache=None)
    assert {len(r.encode_mb_s) for r in results} == {2}
    names = [(r.what, r.threads) for r in results]
    sets = instruction_sets()
    assert len(names) == len(set(names)) == 4 * (len(sets) + 1) + 1
    assert (f"level 2, {sets[-1]}", 2) in names


@pytest.mark.parametrize("bins", [32, 16])
def test_sizes_are_compared_at_equal_error(kv, bins):
    """The step's error is the published quantiser's, in every layer's K and V, and no larger."""
    schedule = np.full((2, 2), bins)
    theirs = codec_sizes.published(kv, 2, 64, schedule)
    x = as_floats(kv, "bfloat16").astype(np.float64)
    scale = np.abs(x).max(axis=3, keepdims=True) / (bins // 2 - 1)
    error = np.sqrt(((np.rint(x / scale) * scale - x) ** 2).mean(axis=(2, 3)))
    np.testing.assert_allclose(theirs.errors, error, rtol=0.02)
    ours = codec_sizes.at_error(kv, 2, 64, theirs.errors)
    assert (ours.errors <= theirs.errors).all()
    assert (ours.errors >= 0.98 * theirs.errors).all()


@pytest.fixture(scope="module")
def inputs():
    """The demo model's own KV, and an 8B-like one."""
    real = sample(str(MODEL), tokens=512)
    return {"real": (real.kv, real.heads), "8B-like": (speed.synthetic(2, 256, 1024), 8)}


@pytest.mark.parametrize(("bins", "times"), [(32, 4.2), (16, 6.0)])
@pytest.mark.parametrize("name", ["real", "8B-like"])
def test_kv_is_so_many_times_smaller_at_the_published_error(inputs, name, bins, times):
    kv, heads = inputs[name]
    schedule = np.full((2, len(kv)), bins)
    theirs = codec_sizes.published(kv, heads, 256, schedule)
    ours = codec_sizes.at_error(kv, heads, 256, theirs.errors)
    assert 16 / ours.bits >= times
    assert ours.bits < theirs.bits < codec_sizes.zstd_of_symbols(kv, 256, schedule)


@pytest.mark.parametrize("name", ["real", "8B-like"])
def test_payload_is_within_one_percent_of_the_cross_entropy_under_its_tables(inputs, name):
    """K and V of one layer, 256 tokens; the symbols and tables are the slow reference's."""
    kv, heads = inputs[name]
    sections = np.ascontiguousarray(kv[1, :, :256])
    encoded = SectionCodec().encode(sections, "bfloat16", plan(DEFAULT_LEVEL, 1), heads=heads)
    for values, body in zip(sections, encoded.sections, strict=True):
        words, raw, escapes, own_tables, lanes = struct.unpack_from("<IIIHB", body)
        at = 20 + 4 * lanes + 2 * words + 2 * escapes + raw
        for _ in range(own_tables):
            at += 4 + 2 * int.from_bytes(body[at : at + 4], "little").bit_count()
        steps = np.frombuffer(body, "<f4", heads, at)
        by_head = np.split(as_floats(values, "bfloat16"), heads, axis=1)
        q = np.hstack(
            [
                reference.quantise(part, np.full(256, np.float32(1) / step))
                for part, step in zip(by_head, steps, strict=True)
            ]
        )
        cross = 0.0
        for channel in q.T:
            chosen = reference.adapt(channel, False)
            seen = chosen["freq"][chosen["symbols"]]
            cross -= np.log2(np.where(seen, seen, chosen["freq"][0]) / 4096).sum()
        assert cross < 32 * lanes + 16 * words <= 1.01 * cross


@pytest.mark.parametrize("name", ["real", "8B-like"])
def test_kv_takes_at_most_two_thirds_of_lmcaches_tables_and_payload(inputs, name):
    """Its bytes counted by its format, without its coder's losses: 33 16-bit entries of a CDF per
    channel, the entropy of its symbols, lengths and scales; 0.65 is the bound."""
    kv, heads = inputs[name]
    layers, _, tokens, channels = kv.shape
    half, x = 15, as_floats(kv, "bfloat16")
    q = np.rint(x * half / np.abs(x).max(axis=3, keepdims=True)).astype(int) + half
    lmcache = 0.0
    for start in range(0, tokens, 256):
        part = q[:, :, start : start + 256]
        flat = part + 32 * np.arange(channels)
        for section in flat.reshape(2 * layers, -1, channels):
            counts = np.bincount(section.ravel(), minlength=32 * channels).reshape(channels, 32)
            seen = counts[counts > 0]
            lmcache += len(section) * np.log2(len(section)) * channels - seen @ np.log2(seen)
        lmcache += 2 * layers * (channels * (33 * 16 + 32) + part.shape[2] * 16)
    theirs = codec_sizes.published(kv, heads, 256, np.full((2, layers), 32))
    ours = codec_sizes.at_error(kv, heads, 256, theirs.errors)
    assert ours.bits * kv.size <= 0.65 * lmcache


@pytest.mark.skipif("KVC_LMCACHE_PYTHON" not in os.environ, reason="no KVC_LMCACHE_PYTHON")
def test_lmcaches_codec_answers_by_its_own_interpreter(kv):
    with Lmcache(Path(os.environ["KVC_LMCACHE_PYTHON"])) as lmcache:
        coded = lmcache.code(kv, 2, 64, default_bins(2))
    published = codec_sizes.published(kv, 2, 64, default_bins(2))
    np.testing.assert_allclose(codec_sizes.errors_of(coded.back, kv), published.errors, rtol=0.05)
    assert coded.bytes > published.bits * kv.size / 8


def test_an_interpreter_without_lmcache_says_so(kv):
    with (
        Lmcache(Path(sys.executable)) as lmcache,
        pytest.raises(LmcacheFailed, match="No module named 'lmcache'"),
    ):
        lmcache.code(kv, 2, 64, default_bins(2))


def test_a_file_that_is_no_interpreter_says_so(tmp_path):
    nothing = tmp_path / "python"
    nothing.touch()
    with pytest.raises(LmcacheFailed, match="Permission denied"), Lmcache(nothing):
        pass


def test_lmcaches_default_schedule():
    assert (default_bins(9) == 32).all()
    bins = default_bins(32)
    assert (bins == 32).sum(axis=1).tolist() == [10, 2] and (bins[:, -1] == 16).all()


def test_recoding_costs_what_is_stored():
    from vllm_kvcompress.bench import codec_quality as quality

    x = np.random.default_rng(0).normal(size=(2, 2, 70, 64)).astype(np.float32)
    back, size = quality.eight_bit(x)
    assert size == x.size + 2 * 2 * 2 * 70
    assert np.abs(back - x).max() <= np.abs(x).max() / 254 * 1.001
    codec = ChunkCodec()
    back, size = quality.by_codec(codec, 4, 2, 64)(x)
    want, raw = quality.plain(x)
    np.testing.assert_array_equal(back, want)
    assert size < raw == 2 * x.size


def test_other_bytes_of_the_same_values_are_only_sized():
    from random import Random

    from vllm_kvcompress.bench import codec_quality as quality
    from vllm_kvcompress.bench.demo_model.language import needle_task

    published = quality.Way("bf16", "", quality.plain)
    every = quality.Rewritten("all", "", published, lambda kv: 3.0)
    second = quality.Rewritten("some", "", published, lambda kv: 2.0, every=2)
    reader = quality.Reader(Path(quality.DEMO_MODEL))
    for i in range(3):
        row = reader.encode(needle_task(Random(i), 300, 0.3))
        quality.ask(reader, row, [published, every, second], 128, i)
    assert every.bits == [3.0] * 3 and second.bits == [2.0] * 2
    assert every.to_dict()["kl"] == published.to_dict()["kl"]
    assert second.to_dict()["sizes_of"] == 2


def test_the_quality_bench_asks_the_untouched_cache_too():
    """bf16 hardly differs from the full cache; noise does."""
    from random import Random

    from vllm_kvcompress.bench import codec_quality as quality
    from vllm_kvcompress.bench.demo_model.language import needle_task

    reader = quality.Reader(Path(quality.DEMO_MODEL))
    noise = np.random.default_rng(0)
    all_ways = [
        quality.Way("same", "", lambda kv: (kv, 1)),
        quality.Way("bf16", "", quality.plain),
        quality.Way("noise", "", lambda kv: (noise.normal(size=kv.shape).astype(np.float32), 1)),
    ]
    row = reader.encode(needle_task(Random(1), 400, 0.3))
    right = quality.ask(reader, row, all_ways, 128)
    same, bf16, lost = all_ways
    assert same.kl[0] == 0 and same.right == right
    assert bf16.kl[0] < 0.05 < lost.kl[0]
    assert lost.right == 0
