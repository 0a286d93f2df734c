"""One step's rows as sequences of heads, laid out on the device.

What varies from step to step (which row is which compressed request, lengths, blocks) is device
memory at fixed addresses, so a captured graph follows it. What a graph fixes (rows, the longest
sequence) is known on the host without asking the device.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_kvcompress.engine.attention.interface import AttentionEngine, HeadCall
from vllm_kvcompress.engine.batch import Sequences
from vllm_kvcompress.kernels import Arenas, fill_tables, split_pages
from vllm_kvcompress.paging.pool import PagePool


class Scratch:
    """Tables of one layer's heads, written anew by every layer of a step, and the rows' slots.

    Args:
        most_rows: rows of the largest batch.
        width: blocks that a request may have.
    """

    def __init__(self, most_rows: int, heads: int, width: int, device: torch.device) -> None:
        sequences = most_rows * heads
        self._heads, self.rows, self.width = heads, most_rows, width
        self._tables = torch.zeros(sequences * width, dtype=torch.int32, device=device)
        self._lengths = torch.zeros(sequences, dtype=torch.int32, device=device)
        self._slots = torch.full((most_rows,), -1, dtype=torch.int32, device=device)
        self._entered = np.full(most_rows, -1, dtype=np.int32)  # what `_slots` holds
        self.query_start_loc = torch.arange(sequences + 1, dtype=torch.int32, device=device)

    @staticmethod
    def bytes_of(most_rows: int, heads: int, width: int) -> int:
        return 4 * (most_rows * heads * (width + 2) + most_rows)

    def enter(self, rows: list[tuple[int, int]], num_rows: int) -> Tensor:
        """Slots of a batch's rows, int32 `[num_rows]`; copied only where one has changed.

        Args:
            rows: (row, slot) of the compressed requests; the others get -1.
        """
        slots = np.full(num_rows, -1, dtype=np.int32)
        if rows:
            at, of = np.array(rows).T
            slots[at] = of
        if not np.array_equal(slots, self._entered[:num_rows]):
            self._entered[:num_rows] = slots
            async_tensor_h2d(slots, out=self._slots[:num_rows])
        return self._slots[:num_rows]

    def tables(self, rows: int) -> tuple[Tensor, Tensor]:
        """Room for `[1, rows, H, width]` page ids and `[1, rows, H]` lengths."""
        sequences = rows * self._heads
        tables = self._tables[: sequences * self.width]
        tables = tables.view(1, rows, self._heads, self.width)
        return tables, self._lengths[:sequences].view(1, rows, self._heads)


@dataclass(frozen=True, slots=True)
class DeviceHeads:
    """R rows of a batch that are attended head by head.

    slots: int32 `[R]`, negative for a request that reads its natural pages.
    block_table: int32 `[R, W]` natural blocks; seq_lens: int32 `[R]` tokens once the step is done.
    sequences: where their queries stand; None when row r's only query is token r of the batch.
    longest: an upper bound of `seq_lens` that the host knows.
    """

    arenas: Arenas
    scratch: Scratch
    slots: Tensor
    block_table: Tensor
    seq_lens: Tensor
    sequences: Sequences | None
    longest: int

    def attend(
        self,
        impl: Any,
        engine: AttentionEngine,
        pool: PagePool,
        layer: int,
        query: Tensor,
        output: Tensor,
    ) -> None:
        """Write these rows of `output [T, Hq, D]`; `query` likewise."""
        rows = len(self.block_table)
        tables, lengths = self.scratch.tables(rows)
        fill_tables(
            self.arenas,
            self.slots,
            self.block_table,
            self.seq_lens,
            pool.page_tokens,
            layer,
            tables,
            lengths,
        )
        heads, where = pool.num_heads, self.sequences
        queries, out = query.unflatten(1, (heads, -1)), output.unflatten(1, (heads, -1))
        keys, values = split_pages(pool.cache)
        if where is None:
            mine = queries[:rows].flatten(0, 1)
            attended = out[:rows].view(rows * heads, *out.shape[2:])
            starts = self.scratch.query_start_loc[: rows * heads + 1]
        else:
            mine, starts = queries[where.tokens, where.lanes], where.query_start_loc
            attended = torch.empty_like(mine)
        engine.attend(
            HeadCall(
                queries=mine,
                keys=keys,
                values=values,
                tables=tables.view(rows * heads, self.scratch.width),
                lengths=lengths.view(rows * heads),
                query_start_loc=starts,
                most_queries=1 if where is None else where.most_queries,
                longest=self.longest,
                scale=impl.scale,
                softcap=impl.logits_soft_cap,
                out=attended,
            )
        )
        if where is not None:
            out[where.tokens, where.lanes] = attended
