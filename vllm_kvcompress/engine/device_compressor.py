"""The compressor where the pages are on a GPU: the same steps, by the kernels for it."""

from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor

from vllm_kvcompress.config import EngineConfig
from vllm_kvcompress.engine.candidates import Candidates
from vllm_kvcompress.engine.compressor import Compressor
from vllm_kvcompress.engine.windows import QueryWindow
from vllm_kvcompress.kernels import WindowScore, compact, score_window, split_pages
from vllm_kvcompress.paging.device_tables import DeviceTables
from vllm_kvcompress.paging.pool import PagePool
from vllm_kvcompress.policy.attention import AttentionScorer
from vllm_kvcompress.policy.interfaces import Scorer


class DeviceCompressor(Compressor):
    """Scores windows, copies tokens and keeps tables on the device of the pool.

    Args:
        most_requests, most_blocks: see `DeviceTables`.
    """

    tables: DeviceTables

    def __init__(
        self,
        config: EngineConfig,
        pool: PagePool,
        scale: float,
        mean_over_ranks: Callable[[Tensor], Tensor],
        most_requests: int,
        most_blocks: int,
    ) -> None:
        self._sizes = most_requests, most_blocks
        super().__init__(config, pool, scale, mean_over_ranks)
        self._keys, self._values = split_pages(pool.cache)

    def _new_tables(self) -> DeviceTables:
        return DeviceTables(self.pool, *self._sizes)

    def _copy(self, candidates: Tensor, tokens: int, kept: Tensor, arena_blocks: Tensor) -> None:
        compact(self._keys, self._values, candidates, tokens, kept, arena_blocks)

    def _score_layer(
        self, scorer: Scorer, candidates: Candidates, layer: int, window: QueryWindow | None
    ) -> Tensor:
        if type(scorer) is not AttentionScorer or window is None:
            return super()._score_layer(scorer, candidates, layer, window)
        heads, tokens = self.pool.num_heads, candidates.positions.shape[-1]
        if candidates.valid is None:
            lengths = torch.full((heads,), tokens, dtype=torch.int32, device=self.pool.device)
        else:
            lengths = candidates.valid.sum(dim=-1, dtype=torch.int32)
        return score_window(
            window.layer(layer, heads),
            window.positions(),
            self._keys,
            candidates.pages.contiguous(),
            lengths,
            candidates.positions.contiguous(),
            self._scale,
            WindowScore(**{rule.name: getattr(scorer, rule.name) for rule in fields(WindowScore)}),
        )
