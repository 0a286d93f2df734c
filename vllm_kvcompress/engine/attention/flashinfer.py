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
WORKSPACE_BYTES = 256 << 20


class FlashInferEngine(AttentionEngine):
    """`trtllm_batch_decode_with_kv_cache` (XQA on Hopper, TensorRT-LLM's on Blackwell).

    Several query tokens go to the engine `triton`.
    """

    name = "flashinfer"
    beside = ("FLASH_ATTN", "TRITON_ATTN")

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
        if call.softcap or call.keys.shape[1] not in PAGE_TOKENS:
            raise ValueError(
                f"attention_engine=flashinfer takes blocks of {PAGE_TOKENS} tokens and no "
                f"softcap, not {call.keys.shape[1]} tokens and softcap {call.softcap}"
            )
        if self._workspace is None:  # zeros: its first bytes are semaphores
            shape = (WORKSPACE_BYTES,)
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
