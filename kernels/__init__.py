"""Triton kernels on per-head pages, each beside the torch reference it must equal.

Pages come as vLLM's GPU backends see the pool: keys and values `[pages, B, 1, D]`, two strided
views of `[pages, 1, B, 2*D]`, a token's value right behind its key (`split_pages`). No kernel
waits for the device or looks at data on the host, so all of them may stand in CUDA graphs.
"""

from vllm_kvcompress.kernels.attention import (
    MIN_SPLIT_TOKENS,
    attend_pages,
    attend_pages_reference,
    splits_for,
)
from vllm_kvcompress.kernels.compaction import compact, compact_reference, split_pages
from vllm_kvcompress.kernels.scoring import WindowScore, score_window, score_window_reference
from vllm_kvcompress.kernels.slots import head_slots, head_slots_reference
from vllm_kvcompress.kernels.tables import Arenas, fill_tables, fill_tables_reference

__all__ = [
    "MIN_SPLIT_TOKENS",
    "Arenas",
    "WindowScore",
    "attend_pages",
    "attend_pages_reference",
    "compact",
    "compact_reference",
    "fill_tables",
    "fill_tables_reference",
    "head_slots",
    "head_slots_reference",
    "score_window",
    "score_window_reference",
    "split_pages",
    "splits_for",
]
