"""`flash_attn`: vLLM's build of FlashAttention 2 or 3."""

from typing import Any

from vllm import envs
from vllm.config import get_current_vllm_config_or_none
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
from vllm.v1.attention.backends import fa_utils

from vllm_kvcompress.accounting import ceil_div
from vllm_kvcompress.engine.attention.interface import FLOAT32, AttentionEngine, HeadCall

VERSIONS = (2, 3)
MOST_SPLITS = 32  # as vLLM's own in CUDA graphs
SPLIT_TOKENS = 256
MOST_SPLIT_SEQUENCES = 992  # a batch that its scheduling kernel sees at once
MOST_PARTIAL_ELEMENTS = 1 << 24  # of all splits' float32 results together: 64 MiB


class FlashAttentionEngine(AttentionEngine):
    """`flash_attn_varlen_func` with a block table; its causal mask ends at the newest token.

    In the version that vLLM takes for the model of its current configuration.

    Raises:
        ValueError: that version is not called here.
    """

    name = "flash_attn"
    beside = ("FLASH_ATTN",)

    def __init__(self) -> None:
        config = get_current_vllm_config_or_none()
        model = config.model_config if config else None
        size = model.get_head_size() if model else None
        self._version = fa_utils.get_flash_attn_version(head_size=size)
        if self._version not in VERSIONS:
            raise ValueError(
                f"attention_engine=flash_attn calls FlashAttention 2 and 3; for heads of {size} "
                f"vLLM takes {self._version} on this GPU: choose another attention_engine"
            )

    @classmethod
    def obstacle(cls, platform: Any, dtype: str) -> str | None:
        if not platform.is_cuda():
            return "vLLM carries FlashAttention for CUDA GPUs only"
        if dtype in FLOAT32:
            return "it takes float16 and bfloat16 only"
        if not fa_utils.is_flash_attn_varlen_func_available():
            return "this vLLM was built without its vllm_flash_attn"
        if fa_utils.get_flash_attn_version() not in VERSIONS:
            return "vLLM takes neither FlashAttention 2 nor 3 on this GPU"
        return None

    def attend(self, call: HeadCall) -> None:
        splits = _most_splits(self._version, call.longest, len(call.lengths), call.queries.numel())
        # Strides of a dimension of one are arbitrary, but FlashAttention 3 hands them to TMA.
        fa_utils.flash_attn_varlen_func(
            q=call.queries,
            k=canonicalize_singleton_dim_strides(call.keys),
            v=canonicalize_singleton_dim_strides(call.values),
            out=call.out,
            cu_seqlens_q=call.query_start_loc,
            max_seqlen_q=call.most_queries,
            seqused_k=call.lengths,
            max_seqlen_k=call.longest,
            softmax_scale=call.scale,
            causal=True,
            block_table=call.tables,
            softcap=call.softcap,
            fa_version=self._version,
            num_splits=splits,
        )


def _most_splits(version: int | None, longest: int, sequences: int, elements: int) -> int:
    """For FlashAttention 3 a bound, within which its kernels split by the lengths on the device.

    It makes room for every split of all queries, outside of vLLM's memory profile; left to itself
    (0) for over 100. Larger batches than `MOST_SPLIT_SEQUENCES` it never splits.

    Args:
        elements: of the queries of the batch.
    """
    if envs.VLLM_BATCH_INVARIANT:
        return 1
    if version != 3:
        return 0
    if sequences > MOST_SPLIT_SEQUENCES:
        return 1
    room = max(1, MOST_PARTIAL_ELEMENTS // elements)
    return min(MOST_SPLITS, ceil_div(longest, SPLIT_TOKENS), room)
