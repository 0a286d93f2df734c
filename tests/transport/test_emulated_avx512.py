"""The AVX-512 path on machines without it: its intrinsics emulated by SIMDe, the same bytes."""

import importlib.util
import shutil
import subprocess
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from transport import samples

from vllm_kvcompress.transport.codec import SectionCodec, codebook
from vllm_kvcompress.transport.levels import EXACT, FIXED_STEP, PER_TOKEN, Plan

ROOT = Path(__file__).resolve().parent.parent.parent
SIMDE = Path("/usr/include/simde/x86/avx512.h")

pytestmark = [
    pytest.mark.skipif(not SIMDE.exists(), reason="no SIMDe here: apt-get install libsimde-dev"),
    pytest.mark.skipif(not shutil.which("g++"), reason="no g++ here"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The extension, built with emulated AVX-512."""
    import nanobind

    package = Path(nanobind.__file__).parent
    includes = [
        *(ROOT / "csrc", nanobind.include_dir(), package / "ext/robin_map/include"),
        sysconfig.get_path("include"),
    ]
    library = tmp_path_factory.mktemp("emulated") / "_codec.so"
    command = [
        *("g++", "-std=c++17", "-O1", "-mavx2", "-mfma", "-mbmi2", "-mpopcnt", "-fPIC", "-shared"),
        *("-ffp-contract=off", "-fno-strict-aliasing", "-fvisibility=hidden", "-Wno-psabi"),
        "-DNB_DOMAIN=emulated",  # else nanobind takes its class for the installed one
        f'-DKVC_EMULATE_AVX512="{Path(__file__).with_name("emulated_avx512.h")}"',
        *(f"-I{path}" for path in includes),
        *(ROOT / "csrc/bindings.cpp", *(ROOT / "csrc/codec").glob("*.cpp")),
        *(Path(nanobind.source_dir()) / "nb_combined.cpp", "-pthread", "-o", library),
    ]
    subprocess.run(list(map(str, command)), check=True)
    spec = importlib.util.spec_from_file_location("_codec", library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def codec_of(module) -> SectionCodec:
    codec = SectionCodec(isa="portable")
    book = codebook()
    codec._native = module.Codec(book["frequencies"], book["spreads"], "avx512")
    assert codec.isa == "avx512"
    return codec


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shape", [(2, 75, 9), (1, 257, 40), (1, 256, 260), (1, 1030, 130)])
@pytest.mark.parametrize(
    ("quantiser", "parameter"), [(FIXED_STEP, 0.5), (PER_TOKEN, 15), (EXACT, 0)]
)
def test_emulated_avx512_gives_the_portable_bytes(emulated, dtype, shape, quantiser, parameter):
    plain, wide = SectionCodec(isa="portable"), codec_of(emulated)
    sections = shape[0]
    plan = Plan(np.full(sections, quantiser, np.uint8), np.full(sections, parameter, np.float32))
    for make in samples.ALL:
        values = samples.bits(make, dtype, *shape)
        want, got = (codec.encode(values, dtype, plan) for codec in (plain, wide))
        assert got.sections == want.sections
        np.testing.assert_array_equal(got.records, want.records)
        data = np.frombuffer(b"".join(want.sections), np.uint8)
        ends = np.cumsum([len(s) for s in want.sections])
        decoded = [np.empty_like(values), np.empty_like(values)]
        for codec, out in zip((plain, wide), decoded, strict=True):
            codec.decode(data, ends, want.records, dtype, out)
        item = np.uint32 if dtype == "float32" else np.uint16
        np.testing.assert_array_equal(decoded[0].view(item), decoded[1].view(item))
