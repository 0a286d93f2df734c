"""Attention packages as far as we call them: their demands are checked, the rest is torch."""

import ast
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
import vllm
from vllm.v1.attention.backends import fa_utils

from vllm_kvcompress.engine.attention.flash_attn import SPLIT_TOKENS
from vllm_kvcompress.engine.attention.flashinfer import FlashInferEngine
from vllm_kvcompress.kernels import attend_pages_reference


def attention(queries, keys, values, tables, lengths, scale, query_start_loc) -> torch.Tensor:
    """f64, every query token as a sequence that ends with it."""
    counts = query_start_loc.diff().tolist()
    rows = [row for row, count in enumerate(counts) for _ in range(count)]
    later = [count - 1 - i for count in counts for i in range(count)]
    until = lengths[rows] - torch.tensor(later)
    return attend_pages_reference(queries, keys, values, tables[rows], until, scale)


def parameters_in(path: Path, function: str) -> list[str]:
    """Names of a function's parameters, read from the source that would run on a GPU."""
    tree = ast.parse(path.read_text())
    (found,) = (
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function
    )
    return [argument.arg for argument in found.args.args]


def flash_attention(monkeypatch) -> list[int]:
    """FlashAttention 3 as vLLM wraps it; grows by the queries of every call."""
    source = Path(vllm.__file__).parent / "vllm_flash_attn/flash_attn_interface.py"
    known, called = parameters_in(source, "flash_attn_varlen_func"), []

    def flash_attn_varlen_func(**given):
        assert set(given) <= set(known)
        assert given["causal"] is True and given["fa_version"] == 3
        keys, values, queries = given["k"], given["v"], given["q"]
        assert keys.shape[2:] == (1, queries.shape[-1]) and keys.stride(-1) == 1
        assert all(stride * keys.element_size() % 16 == 0 for stride in keys.stride()[:-1])
        assert given["block_table"].dtype == given["seqused_k"].dtype == torch.int32
        assert given["cu_seqlens_q"].dtype == torch.int32
        assert int(given["seqused_k"].max()) <= given["max_seqlen_k"]
        filled = -(-given["max_seqlen_k"] // SPLIT_TOKENS)
        assert 1 <= given["num_splits"] <= filled, "no more than the longest sequence fills"
        assert given["seqused_k"].is_contiguous() and given["cu_seqlens_q"].is_contiguous()
        assert given["block_table"].stride(-1) == given["out"].stride(-1) == 1
        cached = keys, values, given["block_table"], given["seqused_k"]
        said = attention(queries, *cached, given["softmax_scale"], given["cu_seqlens_q"])
        given["out"].copy_(said)
        called.append(len(queries))

    monkeypatch.setattr(fa_utils, "flash_attn_varlen_func", flash_attn_varlen_func, raising=False)
    monkeypatch.setattr(fa_utils, "get_flash_attn_version", lambda **_: 3)
    return called


def flashinfer(monkeypatch) -> list[int]:
    """`flashinfer.decode`, the one function that is called; as `flash_attention`."""
    called = []

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
        assert kv_layout == "HND" and keys.shape == values.shape
        assert keys.shape[1::2] == (1, query.shape[-1])
        assert not workspace_buffer.any() and bmm2_scale == 1.0
        assert int(seq_lens.max()) <= max_seq_len
        starts = torch.arange(len(query) + 1)
        halves = keys.transpose(1, 2), values.transpose(1, 2)
        out.copy_(attention(query, *halves, block_tables, seq_lens, bmm1_scale, starts))
        called.append(len(query))

    package, module = ModuleType("flashinfer"), ModuleType("flashinfer.decode")
    module.trtllm_batch_decode_with_kv_cache = trtllm_batch_decode_with_kv_cache
    monkeypatch.setitem(sys.modules, "flashinfer", package)
    monkeypatch.setitem(sys.modules, "flashinfer.decode", module)
    monkeypatch.setattr(FlashInferEngine, "workspace_bytes", 1 << 10)
    return called


def xqa(monkeypatch) -> list[tuple]:
    """FlashInfer's XQA kernel below the package's own Python, on a Hopper that is not there.

    It reads raw memory; grows by what the kernel would be built for.
    """
    decode, package = map(import_module, ("flashinfer.decode", "flashinfer.xqa"))
    asked = []

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
        page_tokens, size = k_cache.shape[1], q.shape[-1]
        assert (num_kv_heads, sliding_win_size, rcp_out_scale, kv_scale) == (1, 0, 1.0, 1.0)
        assert isinstance(q_scale, float) and not run_sm90_fp8_mha and sinks is None
        for tensor in (output, q, page_table, seq_lens):
            assert tensor.is_contiguous()
        assert page_table.dtype == seq_lens.dtype == torch.int32
        assert max_seq_len == page_table.shape[-1] * page_tokens
        assert k_cache.shape[2:] == (1, size), "NHD"
        assert k_cache.stride() == v_cache.stride() and not any(
            stride % size for stride in (k_cache.stride(0), k_cache.stride(1))
        ), "the keys' strides, in heads, are taken for both"
        assert all(tensor.data_ptr() % 16 == 0 for tensor in (k_cache, v_cache, q))
        assert not semaphores.any() and len(semaphores) >= 4 * batch_size
        starts, lengths = torch.arange(batch_size + 1), seq_lens.flatten()
        where = page_table, lengths, q_scale / size**0.5, starts
        output[:, 0] = attention(q[:, 0], k_cache, v_cache, *where).to(output.dtype)

    module = SimpleNamespace(xqa=kernel)
    monkeypatch.setattr(package, "get_xqa_module", lambda *args: asked.append(args) or module)
    for where in (package, decode):
        monkeypatch.setattr(where, "get_compute_capability", lambda device: (9, 0))
        monkeypatch.setattr(where, "device_support_pdl", lambda device: True)
        monkeypatch.setattr(where, "get_device_sm_count", lambda device: 132)
    monkeypatch.setattr(FlashInferEngine, "workspace_bytes", 16 << 20)
    return asked
