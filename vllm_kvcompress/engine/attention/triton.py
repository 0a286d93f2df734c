"""`triton`: our split-KV kernel for one query token, vLLM's unified kernel for several."""

from functools import cache
from typing import Any

import torch
from vllm.triton_utils import HAS_TRITON

from vllm_kvcompress.engine.attention.interface import AttentionEngine, HeadCall


class TritonEngine(AttentionEngine):
    """`kernels.attend_pages`, and `unified_attention` of vLLM's `TRITON_ATTN`."""

    name = "triton"
    beside = ("TRITON_ATTN",)

    @classmethod
    def obstacle(cls, platform: Any, dtype: str) -> str | None:
        return None if HAS_TRITON else "there is no Triton that vLLM can use"

    def attend(self, call: HeadCall) -> None:
        if call.most_queries == 1:
            attend_newest(call)
        else:
            _attend_several(call)


def attend_newest(call: HeadCall) -> None:
    """One query token per sequence, by our kernel."""
    from vllm_kvcompress.kernels import attend_pages, splits_for

    attend_pages(
        call.queries,
        call.keys,
        call.values,
        call.tables,
        call.lengths,
        call.scale,
        call.out,
        splits_for(len(call.lengths), call.longest, _processors(call.queries.device)),
        call.softcap,
    )


def _attend_several(call: HeadCall) -> None:
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    unified_attention(
        q=call.queries,
        k=call.keys,
        v=call.values,
        out=call.out,
        cu_seqlens_q=call.query_start_loc,
        max_seqlen_q=call.most_queries,
        seqused_k=call.lengths,
        max_seqlen_k=call.longest,
        softmax_scale=call.scale,
        causal=True,
        window_size=(-1, -1),
        block_table=call.tables,
        softcap=call.softcap,
        q_descale=None,
        k_descale=None,
        v_descale=None,
    )


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
