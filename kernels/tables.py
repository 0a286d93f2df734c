"""Block tables of the heads, derived on the device, in place.

Of a compressed request only two things are stored: the ids of its K arena blocks, and where each
head's pages begin among the arena's `K*L*H`; of one whose deep layers hold less than the others,
how many of its natural pages each head has. Both its arena pages and its natural tail pages
follow by arithmetic, so a 128K-token prompt at rate 8 costs kilobytes, not the megabytes of its
tables. `fill_tables` writes the tables that attention kernels read, for any range of layers.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512
MOST_PROGRAMS = 4  # per head: most heads are far shorter than their tables are wide


@dataclass(frozen=True)
class Arenas:
    """Device memory of compressed requests, one slot each; written only when one changes.

    blocks: int32 `[slots, K]` arena blocks.
    starts: int32 `[slots, L*H + 1]`, the ordinal of each head's first page in the arena.
    tails: int32 `[slots]`, natural blocks that the arena stands for.
    held: int32 `[slots]`, 1 where there is no arena, and the pages that `starts` counts are each
        head's first natural ones.
    """

    layers: int
    heads: int
    blocks: Tensor
    starts: Tensor
    tails: Tensor
    held: Tensor

    @staticmethod
    def allocate(
        slots: int, layers: int, heads: int, most_blocks: int, device: torch.device | str
    ) -> "Arenas":
        """All slots empty."""
        return Arenas(
            layers,
            heads,
            torch.zeros(slots, most_blocks, dtype=torch.int32, device=device),
            torch.zeros(slots, layers * heads + 1, dtype=torch.int32, device=device),
            torch.zeros(slots, dtype=torch.int32, device=device),
            torch.zeros(slots, dtype=torch.int32, device=device),
        )

    @staticmethod
    def bytes_of(slots: int, layers: int, heads: int, most_blocks: int) -> int:
        """Device memory of `allocate`."""
        return 4 * slots * (most_blocks + layers * heads + 3)

    def put(self, slot: int, blocks: Tensor, pages: Tensor, tail_start_block: int) -> None:
        """Enter a compressed request; `pages` stays on the device.

        Args:
            blocks: int `[K]`.
            pages: int `[L, H]` kept pages per head, summing to `K*L*H`.
            tail_start_block: natural blocks before the tail.

        Raises:
            ValueError: more blocks than a slot has room for.
        """
        if len(blocks) > self.blocks.shape[1]:
            raise ValueError(f"{len(blocks)} arena blocks, a slot holds {self.blocks.shape[1]}")
        self.blocks[slot, : len(blocks)].copy_(blocks)
        self._enter(slot, pages, tail_start_block, held=0)

    def hold(self, slot: int, pages: Tensor, tail_start_block: int) -> None:
        """Enter a request that keeps its first natural pages; `pages` stays on the device.

        Args:
            pages: int `[L, H]` how many each head keeps, at most `tail_start_block`.
            tail_start_block: natural blocks before the tail.
        """
        self._enter(slot, pages, tail_start_block, held=1)

    def clear(self, slot: int) -> None:
        """Empty a slot: a request in it reads natural pages only."""
        self.starts[slot].zero_()
        self.tails[slot].zero_()

    def _enter(self, slot: int, pages: Tensor, tail_start_block: int, held: int) -> None:
        self.starts[slot, 1:].copy_(pages.flatten().cumsum(0))
        self.tails[slot].fill_(tail_start_block)
        self.held[slot].fill_(held)


def fill_tables(
    arenas: Arenas,
    slots: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    page_tokens: int,
    first_layer: int,
    tables: Tensor,
    lengths: Tensor,
) -> None:
    """Write tables and lengths of the layers `first_layer ...` for a step's batch, in place.

    Args:
        slots: int32 `[R]` slot of each row; negative for a request that is not compressed.
        block_table: int32 `[R, W]` natural blocks, as vLLM keeps them.
        seq_lens: int32 `[R]` tokens once the step is done; 0 for a padding row.
        tables: int32 `[layers, R, H, width]`; entries behind a head's last page stay as they
            are. No head ever has more pages than its prompt would have uncompressed, so
            `width = W` is always enough.
        lengths: int32 `[layers, R, H]` kept tokens plus tail.
    """
    layers, rows, heads, width = tables.shape
    if not rows:
        return
    programs = min(MOST_PROGRAMS, triton.cdiv(width, BLOCK))
    _write_tables[(rows * heads, layers, programs)](
        arenas.blocks,
        arenas.starts,
        arenas.tails,
        arenas.held,
        slots,
        block_table,
        seq_lens,
        tables,
        lengths,
        first_layer,
        rows,
        width,
        arenas.blocks.stride(0),
        block_table.stride(0),
        LANES=arenas.layers * heads,
        HEADS=heads,
        PAGE_TOKENS=page_tokens,
        BLOCK=BLOCK,
    )


def fill_tables_reference(
    arenas: Arenas,
    slots: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    page_tokens: int,
    layer: int,
) -> list[list[tuple[list[int], int]]]:
    """Pages and length of every (row, head) of one layer, page by page."""
    lanes = arenas.layers * arenas.heads
    found: list[list[tuple[list[int], int]]] = []
    for row, (slot, seq_len) in enumerate(zip(slots.tolist(), seq_lens.tolist(), strict=True)):
        found.append([])
        for head in range(arenas.heads):
            lane = layer * arenas.heads + head
            pages, tail = [], 0
            if slot >= 0 and seq_len:
                tail = int(arenas.tails[slot])
                start, stop = arenas.starts[slot, lane : lane + 2].tolist()
                if arenas.held[slot]:
                    kept = block_table[row, : stop - start].tolist()
                    pages = [block * lanes + lane for block in kept]
                else:
                    for block, page in (divmod(at, lanes) for at in range(start, stop)):
                        pages.append(int(arenas.blocks[slot, block]) * lanes + page)
            length = len(pages) * page_tokens + seq_len - tail * page_tokens
            natural = block_table[row, tail : -(-seq_len // page_tokens)].tolist()
            pages += [block * lanes + lane for block in natural]
            found[-1].append((pages, length))
    return found


@triton.jit(do_not_specialize=["first_layer", "rows"])
def _write_tables(
    arena_blocks,
    starts,
    tails,
    held,
    slots,
    block_table,
    seq_lens,
    tables,
    lengths,
    first_layer,
    rows,
    width,
    arena_stride,
    table_stride,
    LANES: tl.constexpr,
    HEADS: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    layer = tl.program_id(1)
    lane = (first_layer + layer) * HEADS + head
    seq_len = tl.load(seq_lens + row)
    slot = tl.load(slots + row).to(tl.int64)
    compressed = (slot >= 0) & (seq_len > 0)
    start = tl.load(starts + slot * (LANES + 1) + lane, mask=compressed, other=0)
    stop = tl.load(starts + slot * (LANES + 1) + lane + 1, mask=compressed, other=0)
    tail = tl.load(tails + slot, mask=compressed, other=0)
    kept = stop - start
    in_arena = kept * (1 - tl.load(held + slot, mask=compressed, other=0))
    tail_tokens = seq_len - tail * PAGE_TOKENS
    pages = kept + tl.cdiv(tail_tokens, PAGE_TOKENS)

    sequence = (layer * rows + row).to(tl.int64) * HEADS + head
    end = tl.minimum(pages, width)
    for first in range(tl.program_id(2) * BLOCK, end, tl.num_programs(2) * BLOCK):
        column = first + tl.arange(0, BLOCK)
        used = column < end
        ordinal = start + column
        arena_at = arena_blocks + slot * arena_stride + ordinal // LANES
        arena_block = tl.load(arena_at, mask=used & (column < in_arena), other=0)
        natural = tl.where(column < kept, column, tail + column - kept)
        natural_at = block_table + row.to(tl.int64) * table_stride + natural
        natural_block = tl.load(natural_at, mask=used & (column >= in_arena), other=0)
        page = tl.where(
            column < in_arena, arena_block * LANES + ordinal % LANES, natural_block * LANES + lane
        )
        tl.store(tables + sequence * width + column, page, mask=used)
    if tl.program_id(2) == 0:
        tl.store(lengths + sequence, kept * PAGE_TOKENS + tail_tokens)
