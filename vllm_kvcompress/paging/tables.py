"""Worker side: which pages each head of each compressed request reads, in one rectangle.

    tables[l, slot, h] = [ kept arena pages ... | tail pages ... ]

Slots are dense: `0 .. len(self)`. A layer's slice of the first R slots is the block table of
`R*H` sequences with one KV head each, without a copy.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vllm_kvcompress.paging.pool import PagePool

GROWTH = 1.5


class PageTables:
    """Per-head block tables of the compressed requests of one worker.

    `tables` int32 `[L, slots, H, width]`, `kept` int32 `[L, slots, H]` tokens in the arena.
    """

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        shape = (pool.num_layers, 0, pool.num_heads)
        self.tables = torch.zeros((*shape, 0), dtype=torch.int32)
        self.kept = torch.zeros(shape, dtype=torch.int32)
        self._pages = torch.zeros(shape, dtype=torch.int64)  # arena pages per head
        self._most_pages = np.zeros(0, dtype=np.int64)  # of any head
        self._requests: list[str] = []
        self._slots: dict[str, int] = {}
        self._tail_start = np.zeros(0, dtype=np.int64)  # tokens before each slot's tail
        self._tail_blocks = np.zeros(0, dtype=np.int64)  # tail blocks entered so far

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def num_heads(self) -> int:
        return self._pool.num_heads

    def requests(self) -> list[str]:
        """The compressed requests, slot by slot."""
        return list(self._requests)

    def slot(self, request_id: str) -> int | None:
        return self._slots.get(request_id)

    def put(self, request_id: str, pages: Tensor, arena_pages: Tensor, tail_start: int) -> int:
        """Enter a freshly compressed request, or replace its row; returns its slot.

        Args:
            pages: int64 `[L, H]` kept pages per head.
            arena_pages: int64 `[pages.sum()]`, dealt out to the heads in (layer, head) order.
            tail_start: first token position of its natural tail, a multiple of B.
        """
        slot = self._slots.get(request_id)
        if slot is None:
            slot = len(self._requests)
            self._requests.append(request_id)
            self._slots[request_id] = slot
        most = int(pages.max())
        self._reserve(slot + 1, most + 1)
        row = self.tables[:, slot, :, :most]
        row.masked_scatter_(torch.arange(most) < pages[..., None], arena_pages.to(torch.int32))
        self._pages[:, slot] = pages
        self._most_pages[slot] = most
        self.kept[:, slot] = (pages * self._pool.page_tokens).to(torch.int32)
        self._tail_start[slot] = tail_start
        self._tail_blocks[slot] = 0
        return slot

    def enter(
        self,
        request_id: str,
        pages: Tensor,
        arena_blocks: Tensor,
        tail_start: int,
        again: bool = False,
    ) -> None:
        """`put` with the arena named by its blocks, int64 `[K]`; `arena` answers at any time."""
        self.put(request_id, pages, self._pool.block_pages(arena_blocks), tail_start)

    def hold(self, request_id: str, pages: Tensor, natural: list[int]) -> None:
        """Enter a request whose heads read their first natural pages, some fewer than others.

        Args:
            pages: int64 `[L, H]` how many of them.
            natural: block ids before its tail.
        """
        ids = self._pool.page_ids(self._pool.ids(natural))
        held = torch.arange(len(natural)) < pages[..., None]
        self.put(request_id, pages, ids[held], len(natural) * self._pool.page_tokens)

    def remove(self, request_id: str) -> None:
        """Forget a request; the last slot moves into the hole."""
        hole = self._slots.pop(request_id, None)
        if hole is None:
            return
        last = len(self._requests) - 1
        moved = self._requests.pop()
        if hole != last:
            self._requests[hole] = moved
            self._slots[moved] = hole
            for rows in (self.tables, self.kept, self._pages):
                rows[:, hole] = rows[:, last]
            for column in (self._most_pages, self._tail_start, self._tail_blocks):
                column[hole] = column[last]

    def extend(self, slots: np.ndarray, ends: np.ndarray, block_ids: Sequence[list[int]]) -> Tensor:
        """Enter the tail blocks that positions `0 .. ends` need; returns the tail's tokens.

        Args:
            slots: int64 `[R]`.
            ends: int64 `[R]` tokens computed once this step is done.
            block_ids: each request's natural block ids.

        Returns:
            int32 `[R]` tail tokens per request.
        """
        page_tokens = self._pool.page_tokens
        tails = ends - self._tail_start[slots]
        needed = -(-tails // page_tokens)
        entered = self._tail_blocks[slots]
        new_slots: list[int] = []
        new_columns: list[int] = []  # behind the arena
        new_blocks: list[int] = []
        for row in np.flatnonzero(needed > entered):
            have, want = int(entered[row]), int(needed[row])
            first = int(self._tail_start[slots[row]]) // page_tokens
            new_slots += [int(slots[row])] * (want - have)
            new_columns += range(have, want)
            new_blocks += block_ids[row][first + have : first + want]
        if new_slots:
            self._tail_blocks[slots] = np.maximum(entered, needed)
            self._enter(new_slots, new_columns, new_blocks)
        return torch.from_numpy(tails.astype(np.int32))

    def _enter(self, slots: list[int], columns: list[int], blocks: list[int]) -> None:
        """Write the natural pages of M blocks, each into column `columns` behind its arena."""
        self._reserve(len(self), int((self._most_pages[slots] + columns).max()) + 1)
        ids = self._pool.page_ids(torch.tensor(blocks)).movedim(2, 1)  # [L, M, H]
        slot = torch.tensor(slots)[:, None]
        column = self._pages[:, slots] + torch.tensor(columns)[:, None]
        layer = torch.arange(self._pool.num_layers)[:, None, None]
        head = torch.arange(self.num_heads)
        self.tables[layer, slot, head, column] = ids.to(torch.int32)

    def arena(self, request_id: str) -> tuple[Tensor, Tensor]:
        """A request's kept pages, int64 `[L, H]`, and their ids padded with 0, `[L, H, P]`."""
        slot = self._slots[request_id]
        pages = self._pages[:, slot]
        most = int(pages.max())
        ids = self.tables[:, slot, :, :most].to(torch.int64)
        return pages, ids.masked_fill(torch.arange(most) >= pages[..., None], 0)

    def check_integrity(self) -> None:
        """Raise unless no page stands in two tables.

        Raises:
            RuntimeError: with both counts.
        """
        rows = slice(0, len(self))
        tail = torch.from_numpy(self._tail_blocks[rows])[None, :, None]
        used = torch.arange(self.tables.shape[-1]) < (self._pages[:, rows] + tail)[..., None]
        ids = self.tables[:, rows][used]
        if len(ids) != len(ids.unique()):
            raise RuntimeError(f"{len(ids)} table entries name only {len(ids.unique())} pages")

    def _reserve(self, slots: int, width: int) -> None:
        have_slots, have_width = self.tables.shape[1], self.tables.shape[3]
        if slots <= have_slots and width <= have_width:
            return
        if slots > have_slots:
            slots = max(slots, int(have_slots * GROWTH))
        if width > have_width:
            width = max(width, int(have_width * GROWTH))
        slots, width = max(slots, have_slots), max(width, have_width)
        layers, _, heads = self.kept.shape
        self.tables = _grown(self.tables, (layers, slots, heads, width))
        self.kept = _grown(self.kept, (layers, slots, heads))
        self._pages = _grown(self._pages, (layers, slots, heads))
        self._most_pages = np.resize(self._most_pages, slots)
        self._tail_start = np.resize(self._tail_start, slots)
        self._tail_blocks = np.resize(self._tail_blocks, slots)


def _grown(old: Tensor, shape: tuple[int, ...]) -> Tensor:
    new = torch.zeros(shape, dtype=old.dtype)
    new[tuple(slice(0, size) for size in old.shape)] = old
    return new
