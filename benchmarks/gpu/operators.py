"""Compiled operators of vLLM's CUDA build, on CPU tensors: what a Llama-like model calls.

A build that declares one (the CUDA wheel) gets an implementation for CPUs under its own schema;
another gets the schema too, as of vLLM 0.32.0.
"""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import vllm
from torch import Tensor

COMPILED = ("_C_stable_libtorch", "vllm_flash_attn/_vllm_fa3_C")
_libraries: list[torch.library.Library] = []  # an operator lives as long as its library


def provide() -> None:
    """Declare and implement `OPERATORS`, before vLLM's platform is imported."""
    here = Path(vllm.__path__[0])
    for path in COMPILED:
        name = f"vllm.{path.replace('/', '.')}"
        if not list(here.glob(f"{path}*")):
            sys.modules[name] = ModuleType(name)
        elif "/" not in path:
            import_module(name)
        else:
            torch.ops.load_library(next(here.glob(f"{path}*")))
    for namespace, schema, implementation in OPERATORS:
        library = torch.library.Library(namespace, "FRAGMENT")
        _libraries.append(library)
        name = schema.split("(")[0]
        if not hasattr(getattr(torch.ops, namespace), name):
            library.define(schema)
        library.impl(name, implementation, "CPU", allow_override=True)
    for name in QUESTIONS:
        if not hasattr(torch.ops._C, name):
            library = torch.library.Library("_C", "FRAGMENT")
            _libraries.append(library)
            library.define(f"{name}(int cuda_device_capability) -> bool")
            library.impl(name, lambda capability: False, "CompositeExplicitAutograd")


def rms_norm(result: Tensor, x: Tensor, weight: Tensor | None, epsilon: float) -> None:
    wide = x.float()
    normal = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(x.dtype)
    result.copy_(normal if weight is None else normal * weight)


def fused_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> None:
    residual.add_(x)
    rms_norm(x, residual, weight, epsilon)


def silu_and_mul(result: Tensor, x: Tensor) -> None:
    gate, up = x.chunk(2, dim=-1)
    result.copy_(torch.nn.functional.silu(gate) * up)


def rotary_embedding(
    positions: Tensor,
    query: Tensor,
    key: Tensor | None,
    head_size: int,
    table: Tensor,
    is_neox: bool,
    offset: int = 0,
    inverse: bool = False,
) -> None:
    assert is_neox and not offset and not inverse
    cos, sin = table.index_select(0, positions.flatten()).unsqueeze(1).chunk(2, dim=-1)
    for turned in (query, key):
        if turned is not None:
            heads = turned.view(positions.numel(), -1, head_size)[..., : table.shape[-1]]
            left, right = heads.chunk(2, dim=-1)
            new = left * cos - right * sin, right * cos + left * sin
            left.copy_(new[0])
            right.copy_(new[1])


def reshape_and_cache_flash(
    key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slots: Tensor, *_: Any
) -> None:
    real = slots >= 0
    page, offset = slots[real] // keys.shape[1], slots[real] % keys.shape[1]
    keys[page, offset] = key[: len(slots)][real]
    values[page, offset] = value[: len(slots)][real]


def same(tensor: Tensor) -> Tensor:
    return tensor


def flash_attention(*given: Any) -> Sequence[Tensor]:
    """`_vllm_fa3_C.fwd`, causal and paged: newest tokens last."""
    q, k, v, out, starts, used, table = (given[i] for i in (0, 1, 2, 6, 7, 11, 14))
    scale, causal, softcap = (given[i] for i in (23, 24, 27))
    assert causal and not softcap
    out = torch.empty_like(q) if out is None else out
    group = q.shape[1] // k.shape[2]
    for row, length in enumerate(used.tolist()):
        begin, end = starts[row : row + 2].tolist()
        if begin == end:
            continue
        pages = table[row, : -(-length // k.shape[1])].long()
        held = [x[pages].flatten(0, 1)[:length].float() for x in (k, v)]
        keys, values = (x.repeat_interleave(group, dim=1) for x in held)
        logits = torch.einsum("qhd,khd->hqk", q[begin:end].float(), keys) * scale
        at = torch.arange(length - (end - begin), length)
        logits.masked_fill_(torch.arange(length) > at[:, None], -torch.inf)
        mixed = torch.einsum("hqk,khd->qhd", logits.softmax(-1).nan_to_num(), values)
        out[begin:end] = mixed.to(out.dtype)
    nothing = out.new_empty(0)
    return out, nothing, nothing, nothing


def flash_attention_schedule(batch_size: int, *_: Any) -> Tensor:
    return torch.zeros(batch_size + 1, dtype=torch.int32)


FWD = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor? k_new, Tensor? v_new, Tensor? q_v, Tensor(a!)? out,"
    " Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? cu_seqlens_k_new, Tensor? seqused_q,"
    " Tensor? seqused_k, int? max_seqlen_q, int? max_seqlen_k, Tensor? page_table,"
    " Tensor? kv_batch_idx, Tensor? leftpad_k, Tensor? rotary_cos, Tensor? rotary_sin,"
    " Tensor? seqlens_rotary, Tensor? q_descale, Tensor? k_descale, Tensor? v_descale,"
    " float? softmax_scale, bool is_causal, int window_size_left, int window_size_right,"
    " float softcap, bool is_rotary_interleaved, Tensor? scheduler_metadata, int num_splits,"
    " bool? pack_gqa, int sm_margin, Tensor? s_aux, int cp_world_size, int cp_rank,"
    " Tensor? cp_tot_seqused_k) -> (Tensor(a!), Tensor, Tensor, Tensor)"
)
SCHEDULE = (
    "get_scheduler_metadata(int batch_size, int max_seqlen_q, int max_seqlen_k, int num_heads,"
    " int num_heads_k, int headdim, int headdim_v, ScalarType qkv_dtype, Tensor seqused_k,"
    " Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? cu_seqlens_k_new, Tensor? seqused_q,"
    " Tensor? leftpad_k, int? page_size, int max_seqlen_k_new, bool is_causal,"
    " int window_size_left, int window_size_right, bool has_softcap, int num_splits,"
    " bool? pack_gqa, int sm_margin) -> Tensor"
)
QUESTIONS = (
    "cutlass_scaled_mm_supports_fp8",
    "cutlass_scaled_mm_supports_block_fp8",
    "cutlass_group_gemm_supported",
)
OPERATORS: Sequence[tuple[str, str, Callable[..., Any]]] = (
    ("_C", "rms_norm(Tensor! result, Tensor input, Tensor? weight, float epsilon) -> ()", rms_norm),
    (
        "_C",
        "fused_add_rms_norm(Tensor! input, Tensor! residual, Tensor? weight, float epsilon) -> ()",
        fused_add_rms_norm,
    ),
    ("_C", "silu_and_mul(Tensor! result, Tensor input) -> ()", silu_and_mul),
    (
        "_C",
        "rotary_embedding(Tensor positions, Tensor! query, Tensor!? key, int head_size,"
        " Tensor cos_sin_cache, bool is_neox, int rope_dim_offset=0, bool inverse=False) -> ()",
        rotary_embedding,
    ),
    ("_C", "weak_ref_tensor(Tensor(a) input) -> Tensor(a)", same),
    (
        "_C_cache_ops",
        "reshape_and_cache_flash(Tensor key, Tensor value, Tensor! key_cache, Tensor! value_cache,"
        " Tensor slot_mapping, str kv_cache_dtype, Tensor k_scale, Tensor v_scale) -> ()",
        reshape_and_cache_flash,
    ),
    ("_vllm_fa3_C", FWD, flash_attention),
    ("_vllm_fa3_C", SCHEDULE, flash_attention_schedule),
)
