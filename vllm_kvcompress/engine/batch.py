"""One step's compressed requests, laid out as sequences with one KV head each.

Any paged kernel is a per-head kernel: (request, head) is a sequence, its block table a row of
`PageTables`, its queries the G query heads of that KV head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_kvcompress.paging.tables import PageTables


@dataclass(frozen=True, slots=True)
class Sequences:
    """Where R requests' tokens stand in the batch, sequence by sequence.

    rows: int64 `[R]` their rows in the runner's batch.
    tokens, lanes: int64 `[sum(q)*H]`, the token and the KV head each query is of.
    query_start_loc: int32 `[R*H + 1]`.
    counts: int32 `[R]` tokens of each; most_queries: the most of them.
    """

    rows: Tensor
    tokens: Tensor
    lanes: Tensor
    query_start_loc: Tensor
    counts: Tensor
    most_queries: int

    @staticmethod
    def of(rows: Sequence[int] | np.ndarray, query_start: np.ndarray, heads: int) -> "Sequences":
        """Those of some rows of a batch; `query_start` int `[num_reqs + 1]`, each row's first."""
        chosen = np.asarray(rows)
        starts = query_start[chosen]
        counts = query_start[chosen + 1] - starts
        return _sequences(*(tuple(part.tolist()) for part in (chosen, starts, counts)), heads)

    def on(self, device: torch.device) -> "Sequences":
        """A copy there, without waiting for the device."""
        if device.type == "cpu":
            return self
        tensors = (self.rows, self.tokens, self.lanes, self.query_start_loc, self.counts)
        there = (async_tensor_h2d(tensor, device=device) for tensor in tensors)
        return Sequences(*there, self.most_queries)


@dataclass(frozen=True, slots=True)
class HeadBatch:
    """R compressed requests of a step as `R*H` sequences.

    seq_lens: int32 `[L, R*H]`, kept tokens plus tail; longest: an upper bound of them.
    """

    sequences: Sequences
    seq_lens: Tensor
    longest: int
    _tables: PageTables
    _slots: Tensor | slice

    @staticmethod
    def build(
        tables: PageTables,
        rows_and_slots: np.ndarray,
        query_start: np.ndarray,
        ends: np.ndarray,
        block_ids: Callable[[int], list[int]],
    ) -> "HeadBatch":
        """Lay out the step's compressed requests.

        Args:
            rows_and_slots: int64 `[R, 2]`, row in the batch and slot in `tables`, sorted by slot.
            query_start: int `[num_reqs + 1]` first token of each row.
            ends: int64 `[R]` tokens each request has once the step is done.
            block_ids: natural block ids of the r-th.
        """
        rows, slots = rows_and_slots.T
        tails = tables.extend(slots, ends, block_ids)
        dense = len(slots) == slots[-1] + 1
        chosen = slice(0, len(slots)) if dense else torch.from_numpy(slots.copy())
        return HeadBatch(
            sequences=Sequences.of(rows, query_start, tables.num_heads),
            seq_lens=(tables.kept[:, chosen] + tails[:, None]).flatten(1),
            longest=int(ends.max()),
            _tables=tables,
            _slots=chosen,
        )

    def block_table(self, layer: int) -> Tensor:
        """Page ids int32 `[R*H, width]` of one layer."""
        return self._tables.tables[layer, self._slots].flatten(0, 1)


@lru_cache(maxsize=4)  # decoding, a step looks like the one before
def _sequences(
    rows: tuple[int, ...], starts: tuple[int, ...], counts: tuple[int, ...], heads: int
) -> Sequences:
    """Sequence by sequence: request, then head, then token."""
    spans = list(zip(starts, counts, strict=True))
    tokens = [np.tile(np.arange(start, start + count), heads) for start, count in spans]
    lanes = [np.repeat(np.arange(heads), count) for count in counts]
    ends = np.cumsum(np.repeat(counts, heads))
    return Sequences(
        rows=torch.tensor(rows),
        tokens=torch.from_numpy(np.concatenate(tokens)),
        lanes=torch.from_numpy(np.concatenate(lanes)),
        query_start_loc=torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
        counts=torch.tensor(counts, dtype=torch.int32),
        most_queries=max(counts),
    )
