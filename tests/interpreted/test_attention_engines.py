"""Each engine's call, as the package takes it, is attention over every head's own pages."""

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from interpreted import stand_ins
from kernels.caches import noise, poisoned_cache
from vllm.v1.attention.backends import fa_utils

from vllm_kvcompress.bench.gpu import speed
from vllm_kvcompress.bench.gpu.skipped import Skipped
from vllm_kvcompress.config import ATTENTION_ENGINES
from vllm_kvcompress.engine.attention import ENGINES, HeadCall, choose
from vllm_kvcompress.engine.attention.flash_attn import (
    MOST_SPLITS,
    FlashAttentionEngine,
    _most_splits,
)
from vllm_kvcompress.engine.attention.flashinfer import FlashInferEngine
from vllm_kvcompress.engine.attention.triton import TritonEngine
from vllm_kvcompress.engine.attention.xformers import XFormersEngine
from vllm_kvcompress.kernels.cuda import CudaPages

GROUP, SIZE, B = 2, 32, 16
SCALE = SIZE**-0.5
ONE = ([1, 40, 17, 0], [1, 1, 1, 1])
SEVERAL = ([5, 40, 17], [2, 3, 1])
CPU = SimpleNamespace(is_cpu=lambda: True, is_cuda=lambda: False)
GPU = SimpleNamespace(
    is_cpu=lambda: False, is_cuda=lambda: True, has_device_capability=lambda version: True
)


def call_of(lengths, counts, dtype=torch.float32) -> HeadCall:
    cache = poisoned_cache(lengths, B, SIZE, dtype)
    cache.pool.nan_to_num_(nan=0.0)  # engines may read a page to its end
    queries = noise(sum(counts), GROUP, SIZE, dtype=dtype)
    return HeadCall(
        queries=queries,
        keys=cache.keys,
        values=cache.values,
        tables=cache.tables.masked_fill(cache.tables == 1 << 30, 0),
        lengths=cache.lengths,
        query_start_loc=torch.tensor([0, *counts]).cumsum(0).to(torch.int32),
        most_queries=max(counts),
        longest=max(lengths) + 3,
        scale=SCALE,
        softcap=0.0,
        out=torch.full_like(queries, torch.nan),
    )


def expected(call: HeadCall) -> torch.Tensor:
    cached = call.keys, call.values, call.tables, call.lengths
    return stand_ins.attention(call.queries, *cached, call.scale, call.query_start_loc)


@pytest.mark.parametrize("case", [ONE, SEVERAL], ids=["one query", "several"])
def test_triton(case):
    call = call_of(*case)
    TritonEngine().attend(call)
    assert (call.out.double() - expected(call)).abs().max() < 2e-5


def test_the_gpu_check_times_the_cuda_kernel_too(cuda_on_host, monkeypatch):
    monkeypatch.setattr(speed, "cuda_library", lambda: cuda_on_host)
    call = call_of(*ONE)
    engine = speed._engine(speed.CUDA_KERNEL)
    assert isinstance(engine.attend_pages.__self__, CudaPages)
    engine.attend(call)
    assert (call.out.double() - expected(call)).abs().max() < 2e-5
    monkeypatch.setattr(speed, "cuda_library", lambda: None)
    with pytest.raises(Skipped, match="no CUDA kernels"):
        speed._engine(speed.CUDA_KERNEL)


@pytest.mark.parametrize("case", [ONE, SEVERAL], ids=["one query", "several"])
def test_flash_attn(case, monkeypatch):
    called = stand_ins.flash_attention(monkeypatch)
    call = call_of(*case, dtype=torch.float16)
    FlashAttentionEngine().attend(call)
    assert called == [len(call.queries)]
    assert (call.out.double() - expected(call)).abs().max() < 2e-3


def test_flash_attn_makes_no_room_for_splits_of_batches_that_it_never_splits():
    decode = 4 * 128  # elements of one sequence: an 8B model's
    assert _most_splits(3, 131072, 992, 992 * decode) == MOST_SPLITS
    assert _most_splits(3, 300, 992, 992 * decode) == 2
    assert _most_splits(3, 131072, 993, 993 * decode) == 1
    assert _most_splits(2, 131072, 8, 8 * decode) == 0, "FlashAttention 2 chooses itself"


def test_flash_attn_makes_bounded_room_for_splits_of_many_queries():
    one_token = 8 * 4 * 128
    for tokens in (1, 100, 512, 8192):
        splits = _most_splits(3, 131072, 8, tokens * one_token)
        assert splits == 1 or splits * tokens * one_token * 4 <= 64 << 20
    assert _most_splits(3, 131072, 8, 100 * one_token) == MOST_SPLITS
    assert splits == 1


def test_flashinfer(monkeypatch):
    called = stand_ins.flashinfer(monkeypatch)
    engine = FlashInferEngine()
    for case in (ONE, SEVERAL):
        call = call_of(*case)
        engine.attend(call)
        assert (call.out.double() - expected(call)).abs().max() < 2e-5
    assert called == [len(ONE[0])], "one query token of each sequence is its own"


@pytest.mark.skipif(find_spec("flashinfer") is None, reason="no flashinfer-python")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_flashinfer_itself_up_to_its_kernel(dtype, monkeypatch):
    """The package's own Python, on a Hopper that is not there."""
    asked = stand_ins.xqa(monkeypatch)
    call = call_of(*ONE, dtype=dtype)
    FlashInferEngine().attend(call)
    assert asked == [(dtype, dtype, B, SIZE, GROUP, False, dtype, 1, False)]
    assert (call.out.double() - expected(call)).abs().max() < 2e-2


@pytest.mark.skipif(
    XFormersEngine.obstacle(CPU, "float16") is not None, reason="no xformers, or its Triton"
)
def test_xformers():
    engine = XFormersEngine()
    for case in (ONE, SEVERAL):
        call = call_of(*case, dtype=torch.float16)
        engine.attend(call)
        real = call.lengths.repeat_interleave(call.query_start_loc.diff()) > 0
        assert (call.out.double() - expected(call))[real].abs().max() < 2e-3


def test_auto_takes_the_first_that_runs_here(monkeypatch):
    assert set(ENGINES) == set(ATTENTION_ENGINES)
    assert choose("auto", CPU).name == "cpu"
    monkeypatch.setattr(fa_utils, "is_flash_attn_varlen_func_available", lambda: True)
    monkeypatch.setattr(fa_utils, "get_flash_attn_version", lambda **_: 3)
    assert choose("auto", GPU, "bfloat16").name == "flash_attn"
    assert choose("auto", GPU, "float32").name == "triton"
    monkeypatch.setattr(fa_utils, "is_flash_attn_varlen_func_available", lambda: False)
    assert choose("auto", GPU).name == "triton"


@pytest.mark.parametrize(
    ("name", "platform", "says"),
    [
        ("cpu", GPU, "vLLM's CPU build"),
        ("flash_attn", CPU, "CUDA GPUs only"),
        ("flashinfer", GPU, "pip install flashinfer-python"),
        ("xformers", GPU, "pip install xformers"),
    ],
)
def test_an_engine_that_cannot_run_says_why_in_one_line(name, platform, says):
    if find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    with pytest.raises(ValueError, match=rf"attention_engine={name} cannot run here: .*{says}"):
        choose(name, platform)
