"""`xformers`: its split-K kernel with a paged block-diagonal bias."""

from importlib.util import find_spec
from typing import Any

import torch

from vllm_kvcompress.engine.attention.interface import FLOAT32, AttentionEngine, HeadCall
from vllm_kvcompress.engine.attention.triton import TritonEngine

HEAD_SIZES = (16, 32, 64, 128, 256, 512)


class XFormersEngine(AttentionEngine):
    """`fmha.triton_splitk` with `PagedBlockDiagonalPaddedKeysMask`.

    The bias keeps the lengths twice, for the host and for the device. The kernel reads those of
    the device; the host's are upper bounds here. Several query tokens go to the engine `triton`.
    """

    name = "xformers"
    beside = ("FLASH_ATTN", "TRITON_ATTN")

    def __init__(self) -> None:
        from xformers.ops.fmha import attn_bias, common, triton_splitk

        self._bias, self._inputs, self._splitk = attn_bias, common.Inputs, triton_splitk.FwOp
        self._several = TritonEngine()
        self._ops: dict[int, Any] = {}  # by page size

    @classmethod
    def obstacle(cls, platform: Any, dtype: str) -> str | None:
        if find_spec("xformers") is None:
            return "the package is missing: pip install xformers"
        if dtype in FLOAT32:
            return "it takes float16 and bfloat16 only"
        if reason := TritonEngine.obstacle(platform, dtype):
            return reason
        from vllm.triton_utils import triton

        if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9):
            return f"its kernel needs block pointers, which Triton {triton.__version__} dropped"
        return None

    def attend(self, call: HeadCall) -> None:
        if call.most_queries > 1:
            self._several.attend(call)
            return
        sequences, group, size = call.queries.shape
        if call.softcap or size not in HEAD_SIZES:
            raise ValueError(
                f"attention_engine=xformers takes head sizes {HEAD_SIZES} and no softcap, not "
                f"{size} and {call.softcap}"
            )
        pages, page_tokens, _, _ = call.keys.shape
        rows = (1, pages * page_tokens, 1, size)
        keys, values = (
            half.as_strided(rows, (0, half.stride(1), 0, 1)).expand(-1, -1, group, -1)
            for half in (call.keys, call.values)
        )
        inputs = self._inputs(
            query=call.queries[None],
            key=keys,
            value=values,
            attn_bias=self._paged_bias(call, page_tokens),
            scale=call.scale,
        )
        out, _ = self._op(page_tokens).apply(inputs, needs_gradient=False)
        call.out.copy_(out.view(sequences, group, size))

    def _op(self, page_tokens: int) -> Any:
        """The operator with key tiles that divide a page."""
        if page_tokens not in self._ops:
            tile = min(self._splitk.BLOCK_N, page_tokens)
            self._ops[page_tokens] = type("PagedSplitK", (self._splitk,), {"BLOCK_N": tile})
        return self._ops[page_tokens]

    def _paged_bias(self, call: HeadCall, page_tokens: int) -> Any:
        sequences, width = call.tables.shape
        room = width * page_tokens
        ordinal = torch.arange(sequences + 1, dtype=torch.int32, device=call.tables.device)
        queries = self._bias._SeqLenInfo(
            seqstart=call.query_start_loc,
            max_seqlen=1,
            min_seqlen=1,
            seqstart_py=range(sequences + 1),
        )
        held = self._bias._PaddedSeqLenInfo(
            seqstart=ordinal * room,
            max_seqlen=call.longest,
            min_seqlen=0,
            seqstart_py=range(0, (sequences + 1) * room, room),
            seqlen=call.lengths,
            seqlen_py=[call.longest] * sequences,
            padding=room,
        )
        return self._bias.PagedBlockDiagonalPaddedKeysMask(
            q_seqinfo=queries, k_seqinfo=held, block_tables=call.tables, page_size=page_tokens
        )
