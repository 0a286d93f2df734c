"""The CUDA codec's own source, run on this CPU thread by thread, gives the CPU codec's bytes."""

import numpy as np
import pytest
import torch
from transport import reference, samples

from vllm_kvcompress.transport import profile
from vllm_kvcompress.transport.codec import CorruptChunk, SectionCodec
from vllm_kvcompress.transport.cuda import CudaError, CudaSectionCodec
from vllm_kvcompress.transport.levels import EXACT, FIXED_STEP, LEVELS, PER_TOKEN, Plan, plan

DTYPES = ("bfloat16", "float16", "float32")
QUANTISERS = ((FIXED_STEP, 0.6), (FIXED_STEP, 0.02), (PER_TOKEN, 5.0), (EXACT, 0))


@pytest.fixture(scope="module")
def cuda(cuda_on_this_cpu):
    return CudaSectionCodec(cuda_on_this_cpu, "cpu")


def asked(quantiser: int, parameter: float, sections: int) -> Plan:
    return Plan(np.full(sections, quantiser, np.uint8), np.full(sections, parameter, np.float32))


def signed(bits: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(bits.view(np.int32 if bits.itemsize == 4 else np.int16))


def check(cuda, values, dtype, wanted, tables=None, **options):
    """The same bytes and values as the CPU's codec; returns what that one encoded."""
    cpu = SectionCodec(isa="portable")
    encoded = cpu.encode(values, dtype, wanted, tables, **options)
    want = b"".join(encoded.sections)
    got = cuda.encode(signed(values), dtype, wanted, tables, **options)
    assert got.ends.tolist() == np.cumsum([len(s) for s in encoded.sections]).tolist()
    np.testing.assert_array_equal(got.records.numpy(), encoded.records)
    assert got.data.numpy().tobytes() == want
    decoded, out = np.empty_like(values), torch.empty_like(signed(values))
    cpu.decode(got.data.numpy(), got.ends.numpy(), encoded.records, dtype, decoded, tables)
    cuda.decode(got.data, got.ends, got.records, dtype, out, tables)
    assert torch.equal(out, signed(decoded))
    return encoded


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("quantiser", "parameter"), QUANTISERS)
def test_cuda_bytes_are_those_of_the_slow_reference(cuda, dtype, quantiser, parameter):
    for make in samples.ALL:
        values = samples.bits(make, dtype, 2, 75, 9)
        got = cuda.encode(signed(values), dtype, asked(quantiser, parameter, 2))
        ends = [0, *got.ends.tolist()]
        for i, section in enumerate(values):
            records, body = reference.encode_section(section, dtype, quantiser, parameter)
            np.testing.assert_array_equal(got.records[i].numpy(), records)
            assert got.data[ends[i] : ends[i + 1]].numpy().tobytes() == body
        check(cuda, values, dtype, asked(quantiser, parameter, 2))


@pytest.mark.parametrize("level", LEVELS[1:])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_bytes_of_every_level_are_the_cpus(cuda, dtype, level):
    values = samples.bits(samples.gaussian, dtype, 4, 67, 34)
    check(cuda, values, dtype, plan(level, 2), heads=2)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 33, 1), (1, 1, 70), (1, 257, 260), (1, 1024, 128), (2, 1500, 8)]
)
def test_cuda_bytes_of_every_number_of_lanes_and_odd_tails_are_the_cpus(cuda, shape):
    for make in (samples.gaussian, samples.two_peaks):
        values = samples.bits(make, "bfloat16", *shape)
        check(cuda, values, "bfloat16", asked(FIXED_STEP, 0.3, shape[0]))


def test_cuda_codes_by_a_profile_as_the_cpu_does(cuda):
    values = samples.bits(samples.gaussian, "bfloat16", 2, 512, 12)
    offline = profile.build(values.reshape(1, 2, 512, 12), "bfloat16", 3)
    part = np.ascontiguousarray(values[:, 100:180])
    for level in LEVELS[1:]:
        tables, steps = offline.levels[level]
        wanted, options = plan(level, 1), {"heads": 3}
        if steps is not None:
            wanted, options = wanted._replace(parameters=steps), options | {"relative": False}
        encoded = check(cuda, part, "bfloat16", wanted, tables, **options)
        assert (encoded.records[..., 0] == 0).any(), "no channel uses the profile"


@pytest.mark.parametrize(("quantiser", "parameter"), [(FIXED_STEP, 0.5), (PER_TOKEN, 7)])
def test_cuda_sends_losslessly_what_a_step_cannot_hold(cuda, quantiser, parameter):
    values = samples.bits(samples.gaussian, "bfloat16", 3, 40, 16)
    values[1, 7, 3] = 0x7FC0  # a NaN
    out = torch.empty_like(signed(values))
    encoded = check(cuda, values, "bfloat16", asked(quantiser, parameter, 3))
    data = torch.from_numpy(np.frombuffer(b"".join(encoded.sections), np.uint8).copy())
    ends = torch.tensor([len(s) for s in encoded.sections]).cumsum(0)
    cuda.decode(data, ends, torch.from_numpy(encoded.records), "bfloat16", out)
    assert torch.equal(out[1], signed(values)[1])


@pytest.mark.parametrize(("quantiser", "parameter"), QUANTISERS)
def test_cuda_refuses_the_changed_bytes_that_the_cpu_refuses(cuda, quantiser, parameter):
    values = samples.bits(samples.gaussian, "bfloat16", 1, 90, 6)
    cpu = SectionCodec(isa="portable")
    encoded = cpu.encode(values, "bfloat16", asked(quantiser, parameter, 1))
    rng, refused = np.random.default_rng(7), 0
    for _ in range(60):
        data, records = samples.damaged(rng, encoded.sections[0], encoded.records)
        out, want = torch.empty_like(signed(values)), np.empty_like(values)
        ends = torch.tensor([len(data)])
        arguments = torch.from_numpy(data), ends, torch.from_numpy(records), "bfloat16", out
        try:
            cpu.decode(data, ends.numpy(), records, "bfloat16", want)
        except CorruptChunk:
            refused += 1
            with pytest.raises(CorruptChunk, match="section 0"):
                cuda.decode(*arguments)
        else:
            cuda.decode(*arguments)
            assert torch.equal(out, signed(want))
    assert refused > 10


def test_cuda_refuses_shapes_it_does_not_take(cuda):
    values = torch.zeros(1, 1 << 15, 1, dtype=torch.int16)
    with pytest.raises(CudaError, match="error 1 from kvc_encode"):
        cuda.encode(values, "bfloat16", asked(FIXED_STEP, 0.5, 1))
