"""Compressing a prompt by the C++ in csrc/cpu: scores straight from the pages, and the copy."""

from typing import Any

import torch
from torch import Tensor

from vllm_kvcompress.paging.pool import PagePool
from vllm_kvcompress.policy.attention import AttentionScorer

try:
    from vllm_kvcompress.engine import _cpu
except ImportError:  # no C++17 compiler at install: torch does the same, slower
    _cpu = None

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def instruction_sets() -> list[str]:
    """What this machine can run, the slowest first; none where nothing was built."""
    return list(_cpu.instruction_sets()) if _cpu else []


class CPUKernels:
    """The kernels over one pool, on torch's threads.

    Args:
        isa: one of `instruction_sets()`; by default the fastest.
    """

    def __init__(self, pool: PagePool, isa: str = "") -> None:
        pages, form = pool.pages, pool.page_format
        bits = torch.int32 if pages.element_size() == 4 else torch.int16
        by_lane = (where.T.to(torch.int32).contiguous() for where in (form.keys, form.values))
        self._native = _cpu.PageKernels(pages.view(bits), DTYPES.index(pages.dtype), *by_lane, isa)

    @staticmethod
    def of(pool: PagePool) -> "CPUKernels | None":
        """Those of a pool; None where they are not built or do not know its elements."""
        return CPUKernels(pool) if _cpu and pool.pages.dtype in DTYPES else None

    def score(
        self,
        scorer: AttentionScorer,
        queries: Tensor,
        query_positions: Tensor,
        pages: Tensor,
        valid: Tensor | None,
        positions: Tensor,
        scale: float,
    ) -> Tensor:
        """As `AttentionScorer.score`, for all layers at once: f32 `[L, H, n]`.

        A query that sees no key counts nothing.

        Args:
            queries: `[L, w, H, G, D]`.
            query_positions: int64 `[w]`.
            pages: int64 `[L, H, P]` of the candidates.
            valid: bool `[L, H, n]`, False for padding, which stands last; None: there is none.
            positions: int `[n]` or `[L, H, n]`, ascending.
        """
        scores = torch.empty(*pages.shape[:2], positions.shape[-1])
        self._native.score(
            (queries.float() * scale).permute(0, 2, 3, 1, 4).contiguous(),
            query_positions,
            scorer.fade(query_positions),
            pages.contiguous(),
            None if valid is None else valid.sum(dim=-1, dtype=torch.int32),
            positions.long().contiguous(),
            scorer.exclude_tokens,
            scorer.score_window,
            _rule(scorer, queries.shape[3]),
            scores,
            torch.get_num_threads(),
        )
        return scores

    def copy(self, pages: Tensor, tokens: int, kept: Tensor, arena_blocks: Tensor) -> None:
        """Copy tokens, K and V, into the pages of an arena, block by block.

        Args:
            pages: int64 `[L, H, P]` of the candidates.
            tokens: n, candidates per head.
            kept: int64 `[K*L*H*B]` indices into `[L, H, n]`, target page by target page.
            arena_blocks: int64 `[K]`; none of them may hold a source.
        """
        threads = torch.get_num_threads()
        self._native.copy(pages.contiguous(), tokens, kept, arena_blocks, threads)


def _rule(scorer: AttentionScorer, group: int) -> Any:
    before, after = scorer.reach
    return _cpu.Rule(
        square=scorer.power == 2,
        peak=scorer.queries == "max",
        pool_tokens=before + 1 + after,
        pool_before=before,
        pool_mean=scorer.pool == "avg",
        group_max=scorer.group == "max",
        group_factor=1 / group if scorer.group == "mean" else 1.0,
    )
