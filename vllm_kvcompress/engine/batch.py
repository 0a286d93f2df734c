"""One step's compressed requests, laid out as sequences with one KV head each.

Any paged kernel is a per-head kernel: (request, head) is a sequence, its block table a row of
`PageTables`, its queries the G query heads of that KV head.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vllm_kvcompress.paging.tables import PageTables


@dataclass(frozen=True, slots=True)
class HeadBatch:
    """R compressed requests of a step as `R*H` sequences.

    rows: int64 `[R]` their rows in the runner's batch.
    tokens, lanes: int64 `[sum(q)*H]`, the token and the KV head each of their queries is of.
    query_start_loc: int32 `[R*H + 1]`.
    seq_lens: int32 `[L, R*H]`, kept tokens plus tail.
    """

    rows: Tensor
    tokens: Tensor
    lanes: Tensor
    query_start_loc: Tensor
    seq_lens: Tensor
    max_query_len: int
    _tables: PageTables
    _slots: Tensor | None  # None: the first R slots in order

    @staticmethod
    def build(
        tables: PageTables,
        rows_and_slots: Sequence[tuple[int, int]],
        query_start: np.ndarray,
        ends: np.ndarray,
        block_ids: Sequence[list[int]],
    ) -> "HeadBatch":
        """Lay out the step's compressed requests.

        Args:
            rows_and_slots: (row in the batch, slot in `tables`), sorted by slot.
            query_start: int `[num_reqs + 1]` first token of each row.
            ends: int64 `[R]` tokens each request has once the step is done.
            block_ids: natural block ids of each.
        """
        rows = np.array([row for row, _ in rows_and_slots])
        slots = np.array([slot for _, slot in rows_and_slots])
        heads = tables.num_heads
        tails = tables.extend(slots, ends, block_ids)
        starts, counts = query_start[rows], query_start[rows + 1] - query_start[rows]
        tokens, lanes = _sequence_tokens(starts, counts, heads)
        dense = len(slots) == slots[-1] + 1
        chosen = slice(0, len(slots)) if dense else torch.from_numpy(slots)
        lens = tables.kept[:, chosen] + tails[:, None]
        return HeadBatch(
            rows=torch.from_numpy(rows),
            tokens=torch.from_numpy(tokens),
            lanes=torch.from_numpy(lanes),
            query_start_loc=torch.from_numpy(_cumulative(np.repeat(counts, heads))),
            seq_lens=lens.flatten(1),
            max_query_len=int(counts.max()),
            _tables=tables,
            _slots=None if dense else torch.from_numpy(slots),
        )

    def block_table(self, layer: int) -> Tensor:
        """Page ids int32 `[R*H, width]` of one layer."""
        table = self._tables.tables[layer]
        table = table[: len(self.rows)] if self._slots is None else table[self._slots]
        return table.flatten(0, 1)


def _sequence_tokens(
    starts: np.ndarray, counts: np.ndarray, heads: int
) -> tuple[np.ndarray, np.ndarray]:
    """Token and head of every query, sequence by sequence: request, then head, then token."""
    if counts.max() == 1:
        return np.repeat(starts, heads), np.tile(np.arange(heads), len(starts))
    spans = list(zip(starts, counts, strict=True))
    tokens = [np.tile(np.arange(start, start + count), heads) for start, count in spans]
    lanes = [np.repeat(np.arange(heads), count) for count in counts]
    return np.concatenate(tokens), np.concatenate(lanes)


def _cumulative(counts: np.ndarray) -> np.ndarray:
    out = np.zeros(len(counts) + 1, dtype=np.int32)
    np.cumsum(counts, out=out[1:])
    return out
