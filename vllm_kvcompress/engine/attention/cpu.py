"""`cpu`: vLLM's C++ kernel, on pages packed as that kernel likes them."""

from typing import Any

from vllm import _custom_ops as ops
from vllm import envs

from vllm_kvcompress.engine.attention.interface import AttentionEngine, HeadCall


class CPUEngine(AttentionEngine):
    """`ops.cpu_attention_with_kv_cache`; keys and values are the halves of `[pages, 1, 2*B, D]`.

    Args:
        isa: the kernel's instruction set, which decides the packing.
        kv_cache_dtype: as the layer has it.
    """

    name = "cpu"
    beside = ("CPU_ATTN",)

    def __init__(self, isa: str, kv_cache_dtype: str) -> None:
        self._isa, self._kv_cache_dtype = isa, kv_cache_dtype

    @classmethod
    def obstacle(cls, platform: Any, dtype: str) -> str | None:
        return None if platform.is_cpu() else "it is the engine of vLLM's CPU build"

    def attend(self, call: HeadCall) -> None:
        _, group, size = call.queries.shape
        schedule = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(call.lengths),
            num_heads=group,
            num_kv_heads=1,
            head_dim=size,
            seq_lens=call.lengths,
            dtype=call.queries.dtype,
            query_start_loc=call.query_start_loc,
            causal=True,
            sliding_window_size=-1,
            isa=self._isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
            kv_cache_dtype=self._kv_cache_dtype,
        )
        ops.cpu_attention_with_kv_cache(
            query=call.queries,
            key_cache=call.keys,
            value_cache=call.values,
            output=call.out,
            query_start_loc=call.query_start_loc,
            seq_lens=call.lengths,
            scale=call.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=call.tables,
            softcap=call.softcap,
            scheduler_metadata=schedule,
            s_aux=None,
            kv_cache_dtype=self._kv_cache_dtype,
        )
