"""`flashinfer`: its decode kernels that read block tables and lengths on the device.

The planned wrappers want every sequence's pages on the host, and how many pages a head keeps
never leaves the device here.
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from vllm_kvcompress.engine.attention.interface import FLOAT32, AttentionEngine, HeadCall
from vllm_kvcompress.engine.attention.triton import TritonEngine

PAGE_TOKENS = (16, 32, 64, 128)
MOST_GROUP = 32


class FlashInferEngine(AttentionEngine):
    """`trtllm_batch_decode_with_kv_cache` (XQA on Hopper, TensorRT-LLM's on Blackwell).

    Several query tokens go to the engine `triton`.
    """

    name = "flashinfer"
    beside = ("FLASH_ATTN", "TRITON_ATTN")
    workspace_bytes = 256 << 20

    def __init__(self) -> None:
        from flashinfer.decode import trtllm_batch_decode_with_kv_cache

        self._decode = trtllm_batch_decode_with_kv_cache
        self._several = TritonEngine()
        self._workspace: Tensor | None = None

    @classmethod
    def obstacle(cls, platform: Any, dtype: str) -> str | None:
        if not platform.is_cuda():
            return "FlashInfer is for CUDA GPUs"
        if dtype in FLOAT32:
            return "it takes float16 and bfloat16 only"
        if find_spec("flashinfer") is None:
            return "the package is missing: pip install flashinfer-python"
        if not platform.has_device_capability(90):
            return "its kernels with block tables on the device need compute capability 9.0"
        return TritonEngine.obstacle(platform, dtype)

    def attend(self, call: HeadCall) -> None:
        if call.most_queries > 1:
            self._several.attend(call)
            return
        (_, group, size), page_tokens = call.queries.shape, call.keys.shape[1]
        if call.softcap or page_tokens not in PAGE_TOKENS or size % 16 or group > MOST_GROUP:
            raise ValueError(
                f"attention_engine=flashinfer takes blocks of {PAGE_TOKENS} tokens, head sizes "
                f"that are multiples of 16, at most {MOST_GROUP} query heads per KV head and no "
                f"softcap, not {page_tokens}, {size}, {group} and {call.softcap}"
            )
        if self._workspace is None:  # zeros: its first bytes are semaphores
            shape = (self.workspace_bytes,)
            self._workspace = torch.zeros(shape, dtype=torch.uint8, device=call.queries.device)
        self._decode(
            query=call.queries,
            kv_cache=(call.keys.transpose(1, 2), call.values.transpose(1, 2)),  # [pages, 1, B, D]
            workspace_buffer=self._workspace,
            block_tables=call.tables,
            seq_lens=call.lengths,
            max_seq_len=call.longest,
            bmm1_scale=call.scale,
            bmm2_scale=1.0,
            out=call.out,
            kv_layout="HND",
        )
