"""`profile` and `codec` run on the shipped model and say what they measured."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import vllm_kvcompress
from vllm_kvcompress.cli import app
from vllm_kvcompress.transport import sample as sampling
from vllm_kvcompress.transport.chunks import ChunkCodec
from vllm_kvcompress.transport.codec import SectionCodec, as_floats
from vllm_kvcompress.transport.container import Header, pack
from vllm_kvcompress.transport.levels import FIXED_STEP, Plan
from vllm_kvcompress.transport.profile import Profile
from vllm_kvcompress.transport.report import level_sizes

DEMO_MODEL = str(Path(vllm_kvcompress.__file__).parent / "demo_model")


def run(*argv: str):
    return CliRunner().invoke(app, [*argv], env={"COLUMNS": "160"})


@pytest.fixture(scope="module")
def text():
    return sampling.sample(DEMO_MODEL, tokens=1024)


@pytest.fixture(scope="module")
def profile_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("profile") / "demo.profile"
    ran = run("profile", "--model", DEMO_MODEL, "--out", str(path), "--tokens", "1024")
    assert ran.exit_code == 0, ran.output
    assert "4 layers x K, V x 128 channels from 1024 tokens" in ran.output
    return path


def test_codec_reports_every_level_in_table_and_plot(tmp_path):
    plot = tmp_path / "sizes.png"
    ran = run("codec", "--model", DEMO_MODEL, "--tokens", "300", "--plot", str(plot))
    assert ran.exit_code == 0, ran.output
    assert all(f"│ {level} " in ran.output for level in (1, 2, 3, 4))
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_codec_reports_the_bytes_that_are_stored(text):
    ran = run("codec", "--model", DEMO_MODEL, "--tokens", "1024", "--json")
    report = json.loads(ran.output)
    codec = ChunkCodec()
    for level in report["levels"]:
        chunks = [
            codec.encode(np.ascontiguousarray(part), text.dtype, level["level"], heads=text.heads)
            for part in np.split(text.kv, 4, axis=2)
        ]
        assert level["stored"] == pytest.approx(8 * sum(map(len, chunks)) / text.kv.size)


def test_the_sample_is_the_models_own_cache(text):
    """Its keys have positions in them: the same token at two places has two keys, one value."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL)
    with torch.inference_mode():
        layer = model(torch.tensor([[1, 7, 7]]), use_cache=True).past_key_values.layers[0]
    assert not torch.allclose(layer.keys[0, :, 1], layer.keys[0, :, 2], atol=1e-3)
    assert torch.allclose(layer.values[0, :, 1], layer.values[0, :, 2], atol=1e-4)
    assert text.kv.shape == (4, 2, 1024, 4 * 32)
    assert text.kv.dtype == np.uint16


def test_a_profile_helps_on_other_text_of_the_model(profile_file, text):
    offline = Profile.load(profile_file)
    later = text._replace(kv=np.ascontiguousarray(text.kv[:, :, 512:768]))
    with_it = level_sizes(later, ChunkCodec(offline), 256)
    without = level_sizes(later, ChunkCodec(), 256)
    for a, b in zip(with_it, without, strict=True):
        assert a.stored < b.stored
        assert a.profile_share > 0.5


@pytest.mark.parametrize(("bins", "ratio"), [(32, 4.2), (16, 6.0)])
def test_real_kv_at_the_published_quantisers_error_is_far_smaller(text, bins, ratio):
    """At 32 bins LMCache's default stores 5.76 bits per element of such a model, all included."""
    kv = as_floats(text.kv, text.dtype).astype(np.float64)
    half, most = bins // 2 - 1, np.abs(kv).max(axis=3, keepdims=True)
    published = ((np.rint(kv * half / most) * most / half - kv) ** 2).mean(axis=(2, 3)).ravel()
    steps = np.sqrt(12 * published / (kv**2).mean(axis=(2, 3)).ravel())  # that give this error
    stored = square = 0.0
    for part in np.split(text.kv, 4, axis=2):
        values = np.ascontiguousarray(part).reshape(8, 256, 128)
        wanted = Plan(np.full(8, FIXED_STEP, np.uint8), steps.astype(np.float32))
        encoded = SectionCodec().encode(values, text.dtype, wanted)
        header = Header(layers=4, tokens=256, heads=4, head_size=32, dtype=text.dtype, level=3)
        data = pack(header, encoded)
        stored += 8 * len(data)
        back = as_floats(ChunkCodec().decode(data), text.dtype)
        square += ((back - as_floats(np.ascontiguousarray(part), text.dtype)) ** 2).sum()
    assert square / kv.size <= 1.05 * published.mean()
    assert 16 * kv.size / stored >= ratio
    if bins == 32:
        assert stored / kv.size <= 0.65 * 5.76


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "/nowhere"], "model /nowhere"),
        (["--model", DEMO_MODEL, "--dtype", "int3"], "dtype int3"),
        (["--model", DEMO_MODEL, "--profile", __file__], "not a profile"),
    ],
)
def test_a_bad_request_is_answered_in_one_line(arguments, says):
    ran = run("codec", *arguments)
    assert ran.exit_code == 2
    assert says in ran.output
    assert "Traceback" not in ran.output


def test_a_profile_that_cannot_be_written_or_made_of_a_file_says_which(tmp_path):
    binary, nowhere = tmp_path / "binary.txt", tmp_path / "nowhere" / "a.profile"
    binary.write_bytes(bytes(range(256)))
    tried = ["profile", "--model", DEMO_MODEL, "--tokens", "64", "--out"]
    ran = run(*tried, str(nowhere))
    assert ran.exit_code == 2 and f"cannot write {nowhere}: No such file" in ran.output
    ran = run(*tried, str(tmp_path / "a.profile"), "--prompt", str(binary))
    assert ran.exit_code == 2 and f"cannot read {binary}: it is not text" in ran.output
