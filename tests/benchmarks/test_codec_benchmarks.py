"""The codec's benchmarks measure what they say, on small inputs."""

from pathlib import Path

import numpy as np
import pytest

from vllm_kvcompress.bench import codec as speed
from vllm_kvcompress.transport.chunks import ChunkCodec
from vllm_kvcompress.transport.codec import CodecMissing, as_floats, instruction_sets

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


def test_our_bits_are_those_of_the_containers(kv):
    result = speed.ours(kv, 2, 2, 64, "portable", 1, rounds=2)
    parts = [np.ascontiguousarray(kv[:, :, a:b]) for a, b in ((0, 64), (64, 96))]
    size = sum(len(ChunkCodec().encode(part, "bfloat16", 2, heads=2)) for part in parts)
    assert result.bits == pytest.approx(8 * size / kv.size)
    assert len(result.encode_mb_s) == len(result.decode_mb_s) == 2
    assert 0 < result.rms_error < 0.3
    assert speed.ours(kv, 2, 4, 64, "portable", 1, rounds=1).rms_error == 0


def test_zstd_gives_the_same_bytes_back(kv):
    result = speed.zstd_of_bytes(kv, rounds=1)
    assert 4 < result.bits < 16


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
