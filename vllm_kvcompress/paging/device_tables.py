"""Worker side on a GPU: what a compressed request stores there, one fixed slot each.

Only the K arena blocks and where each head's pages begin among them (`kernels.Arenas`), or how
many of its natural pages each head reads; block tables are written from that on the device, layer
by layer. Nothing here moves when requests come and go, so a captured graph may read it.
"""

import torch
from torch import Tensor

from vllm_kvcompress.paging.host_copy import HostCopy
from vllm_kvcompress.paging.pool import PagePool


class DeviceTables:
    """Slots of the compressed requests of one worker.

    Args:
        most_requests: slots.
        most_blocks: blocks that a request may have, which bounds its arena.
    """

    def __init__(self, pool: PagePool, most_requests: int, most_blocks: int) -> None:
        from vllm_kvcompress.kernels import Arenas  # with it comes Triton

        self._pool = pool
        self.arenas = Arenas.allocate(
            most_requests, pool.num_layers, pool.num_heads, most_blocks, pool.device
        )
        self._slots: dict[str, int] = {}
        self._arena_blocks: dict[str, int] = {}
        self._most_pages: dict[str, HostCopy] = {}  # of any head, where `arena` will be asked
        self._free = list(range(most_requests))[::-1]

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def num_heads(self) -> int:
        return self._pool.num_heads

    def requests(self) -> list[str]:
        """The compressed requests."""
        return list(self._slots)

    def slot(self, request_id: str) -> int | None:
        return self._slots.get(request_id)

    def enter(
        self,
        request_id: str,
        pages: Tensor,
        arena_blocks: Tensor,
        tail_start: int,
        again: bool = False,
    ) -> None:
        """Enter a freshly compressed request, or replace what its slot says.

        Args:
            pages: int64 `[L, H]` kept pages per head; stays on the device.
            arena_blocks: int64 `[K]`.
            tail_start: first token position of its natural tail, a multiple of B.
            again: it will be compressed again, and `arena` be asked for.
        """
        self._arena_blocks[request_id] = len(arena_blocks)
        if again:
            self._most_pages[request_id] = HostCopy(pages.max())
        tail_block = tail_start // self._pool.page_tokens
        self.arenas.put(self._slot_for(request_id), arena_blocks, pages, tail_block)

    def hold(self, request_id: str, pages: Tensor, natural: list[int]) -> None:
        """Enter a request whose heads read their first natural pages, some fewer than others.

        Args:
            pages: int64 `[L, H]` how many of them; stays on the device.
            natural: block ids before its tail.
        """
        self.arenas.hold(self._slot_for(request_id), pages, len(natural))

    def _slot_for(self, request_id: str) -> int:
        if request_id not in self._slots:
            self._slots[request_id] = self._free.pop()
        return self._slots[request_id]

    def remove(self, request_id: str) -> None:
        """Forget a request; steps on their way still read its slot before it is written again."""
        slot = self._slots.pop(request_id, None)
        if slot is not None:
            self._arena_blocks.pop(request_id, None)
            self._most_pages.pop(request_id, None)
            self._free.append(slot)

    def arena(self, request_id: str) -> tuple[Tensor, Tensor]:
        """A request's kept pages, int64 `[L, H]`, and their ids padded with 0, `[L, H, P]`.

        Of one entered to be compressed again: P, the pages of the richest head, has come to the
        host since; right after `enter` this waits for the device.
        """
        slot, lanes = self._slots[request_id], self._pool.pages_per_block
        starts = self.arenas.starts[slot].long()
        counts = starts.diff()
        column = torch.arange(int(self._most_pages[request_id].numpy()), device=counts.device)
        ordinal = starts[:-1, None] + column
        blocks = self.arenas.blocks[slot].long()
        ids = blocks[(ordinal // lanes).clamp(max=len(blocks) - 1)] * lanes + ordinal % lanes
        ids = ids.masked_fill(column >= counts[:, None], 0)
        shape = (self._pool.num_layers, self._pool.num_heads)
        return counts.view(shape), ids.view(*shape, -1)

    def check_integrity(self) -> None:
        """Raise unless every arena is dealt out once and no block stands in two.

        Raises:
            RuntimeError: with both counts.
        """
        lanes, seen = self._pool.pages_per_block, []
        for request_id, blocks in self._arena_blocks.items():
            slot = self._slots[request_id]
            dealt = int(self.arenas.starts[slot, -1])
            if dealt != blocks * lanes:
                raise RuntimeError(f"{dealt} pages dealt out of an arena of {blocks * lanes}")
            seen += self.arenas.blocks[slot, :blocks].tolist()
        if len(seen) != len(set(seen)):
            raise RuntimeError(f"{len(seen)} arena blocks are only {len(set(seen))}")
