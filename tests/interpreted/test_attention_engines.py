"""Each engine's call, as the package takes it, is attention over every head's own pages."""

import ast
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import vllm
from kernels.caches import noise, poisoned_cache
from vllm.v1.attention.backends import fa_utils

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
from vllm_kvcompress.kernels import attend_pages_reference

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
    """f64, every query token as a sequence that ends with it."""
    counts = call.query_start_loc.diff().tolist()
    rows = [row for row, count in enumerate(counts) for _ in range(count)]
    later = [count - 1 - i for count in counts for i in range(count)]
    return attend_pages_reference(
        call.queries,
        call.keys,
        call.values,
        call.tables[rows],
        call.lengths[rows] - torch.tensor(later),
        call.scale,
    )


def attend_as_asked(query, keys, values, tables, lengths, scale, query_start_loc) -> torch.Tensor:
    call = call_of(*ONE)
    arguments = (query, keys, values, tables, lengths, query_start_loc)
    names = ("queries", "keys", "values", "tables", "lengths", "query_start_loc")
    fields = {name: getattr(call, name) for name in call.__slots__}
    fields |= dict(zip(names, arguments, strict=True)) | {"scale": scale}
    return expected(HeadCall(**fields)).to(query.dtype)


def parameters_in(path: Path, function: str) -> list[str]:
    """Names of a function's parameters, read from the source that would run on a GPU."""
    tree = ast.parse(path.read_text())
    (found,) = (
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function
    )
    return [argument.arg for argument in found.args.args]


@pytest.mark.parametrize("case", [ONE, SEVERAL], ids=["one query", "several"])
def test_triton(case):
    call = call_of(*case)
    TritonEngine().attend(call)
    assert (call.out.double() - expected(call)).abs().max() < 2e-5


@pytest.mark.parametrize("case", [ONE, SEVERAL], ids=["one query", "several"])
def test_flash_attn(case, monkeypatch):
    source = Path(vllm.__file__).parent / "vllm_flash_attn/flash_attn_interface.py"
    known = parameters_in(source, "flash_attn_varlen_func")

    def flash_attn_varlen_func(**given):
        assert set(given) <= set(known)
        assert given["causal"] is True and given["fa_version"] == 3
        keys = given["k"]
        assert keys.shape[1:] == (B, 1, SIZE) and keys.stride(-1) == 1
        assert all(stride * keys.element_size() % 16 == 0 for stride in keys.stride()[:-1])
        assert given["block_table"].dtype == given["seqused_k"].dtype == torch.int32
        assert given["cu_seqlens_q"].dtype == torch.int32
        assert int(given["seqused_k"].max()) <= given["max_seqlen_k"]
        assert given["num_splits"] == 1, "no more splits than the longest sequence fills"
        assert given["seqused_k"].is_contiguous() and given["cu_seqlens_q"].is_contiguous()
        assert given["block_table"].stride(-1) == given["out"].stride(-1) == 1
        given["out"].copy_(
            attend_as_asked(
                given["q"],
                keys,
                given["v"],
                given["block_table"],
                given["seqused_k"],
                given["softmax_scale"],
                given["cu_seqlens_q"],
            )
        )

    monkeypatch.setattr(fa_utils, "flash_attn_varlen_func", flash_attn_varlen_func, raising=False)
    monkeypatch.setattr(fa_utils, "get_flash_attn_version", lambda **_: 3)
    call = call_of(*case, dtype=torch.float16)
    FlashAttentionEngine().attend(call)
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
    def trtllm_batch_decode_with_kv_cache(  # as of flashinfer-python 0.7.2
        query,
        kv_cache,
        workspace_buffer,
        block_tables,
        seq_lens,
        max_seq_len,
        bmm1_scale=1.0,
        bmm2_scale=1.0,
        window_left=-1,
        out=None,
        kv_layout="HND",
    ):
        keys, values = kv_cache
        assert kv_layout == "HND" and keys.shape[1:] == values.shape[1:] == (1, B, SIZE)
        assert not workspace_buffer.any() and bmm2_scale == 1.0
        assert int(seq_lens.max()) <= max_seq_len
        starts = torch.arange(len(query) + 1)
        halves = keys.transpose(1, 2), values.transpose(1, 2)
        out.copy_(attend_as_asked(query, *halves, block_tables, seq_lens, bmm1_scale, starts))

    package, module = ModuleType("flashinfer"), ModuleType("flashinfer.decode")
    module.trtllm_batch_decode_with_kv_cache = trtllm_batch_decode_with_kv_cache
    monkeypatch.setitem(sys.modules, "flashinfer", package)
    monkeypatch.setitem(sys.modules, "flashinfer.decode", module)
    monkeypatch.setattr(FlashInferEngine, "workspace_bytes", 1 << 10)
    engine = FlashInferEngine()
    for case in (ONE, SEVERAL):
        call = call_of(*case)
        engine.attend(call)
        assert (call.out.double() - expected(call)).abs().max() < 2e-5


@pytest.mark.skipif(find_spec("flashinfer") is None, reason="no flashinfer-python")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_flashinfer_itself_up_to_its_kernel(dtype, monkeypatch):
    """The package's own Python, on a Hopper that is not there; its kernel reads raw memory."""
    decode, xqa = map(import_module, ("flashinfer.decode", "flashinfer.xqa"))

    def kernel(
        run_sm90_fp8_mha,
        sm_count,
        num_kv_heads,
        sliding_win_size,
        q_scale,
        output,
        rcp_out_scale,
        q,
        sinks,
        k_cache,
        v_cache,
        k_sf_cache,
        v_sf_cache,
        page_table,
        max_seq_len,
        seq_lens,
        batch_size,
        kv_scale,
        semaphores,
        workspace_buffer,
        *rest,
    ):
        assert (num_kv_heads, sliding_win_size, rcp_out_scale, kv_scale) == (1, 0, 1.0, 1.0)
        assert isinstance(q_scale, float) and not run_sm90_fp8_mha and sinks is None
        for tensor in (output, q, page_table, seq_lens):
            assert tensor.is_contiguous()
        assert page_table.dtype == seq_lens.dtype == torch.int32
        assert max_seq_len == page_table.shape[-1] * B
        assert k_cache.shape[1:] == (B, 1, SIZE), "NHD"
        assert k_cache.stride() == v_cache.stride() and not any(
            stride % SIZE for stride in (k_cache.stride(0), k_cache.stride(1))
        ), "the keys' strides, in heads, are taken for both"
        assert all(tensor.data_ptr() % 16 == 0 for tensor in (k_cache, v_cache, q))
        assert not semaphores.any() and len(semaphores) >= 4 * batch_size
        starts, lengths = torch.arange(batch_size + 1), seq_lens.flatten()
        where = page_table, lengths, q_scale / SIZE**0.5, starts
        output[:, 0] = attend_as_asked(q[:, 0], k_cache, v_cache, *where)

    module = SimpleNamespace(xqa=kernel)
    asked = []
    monkeypatch.setattr(xqa, "get_xqa_module", lambda *args: asked.append(args) or module)
    for where in (xqa, decode):
        monkeypatch.setattr(where, "get_compute_capability", lambda device: (9, 0))
        monkeypatch.setattr(where, "device_support_pdl", lambda device: True)
        monkeypatch.setattr(where, "get_device_sm_count", lambda device: 132)
    monkeypatch.setattr(FlashInferEngine, "workspace_bytes", 16 << 20)
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
