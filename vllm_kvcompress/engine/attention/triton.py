"""`triton`: our split-KV kernels for one query token, vLLM's unified kernel for several."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from vllm.triton_utils import HAS_TRITON

from vllm_kvcompress.engine.attention.interface import AttentionEngine, HeadCall


class TritonEngine(AttentionEngine):
    """`attend_pages`, and vLLM's `unified_attention`."""

    name = "triton"
    beside = ("TRITON_ATTN",)

    @classmethod
    def obstacle(cls, platform: Any, dtype: str) -> str | None:
        return None if HAS_TRITON else "there is no Triton that vLLM can use"

    def __init__(self) -> None:
        from vllm_kvcompress.kernels import attend_pages

        self.attend_pages: Callable[..., None] = attend_pages

    def attend(self, call: HeadCall) -> None:
        if call.most_queries == 1:
            self.attend_pages(*newest(call))
        else:
            _attend_several(call)


def newest(call: HeadCall) -> tuple[Any, ...]:
    """A call with one query token per sequence, as `kernels.attend_pages` takes it."""
    from vllm_kvcompress.kernels import splits_for

    splits = splits_for(len(call.lengths), call.longest, _processors(call.queries.device))
    cached = call.keys, call.values, call.tables, call.lengths
    return (call.queries, *cached, call.scale, call.out, splits, call.softcap)


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
