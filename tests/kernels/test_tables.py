"""Tables derived on the device name the pages that the request really holds."""

import pytest
import torch

from vllm_kvcompress.kernels import (
    Arenas,
    fill_tables,
    fill_tables_reference,
    head_slots,
    head_slots_reference,
)
from vllm_kvcompress.kernels import tables as tables_module

LAYERS, HEADS, B, WIDTH = 3, 2, 16, 12
LANES = LAYERS * HEADS


def arenas_with(requests, seed=0):
    """Slots 0, 2, 4, ... with arenas of the given numbers of blocks, dealt out unevenly."""
    draw = torch.Generator().manual_seed(seed)
    arenas = Arenas.allocate(2 * len(requests) + 1, LAYERS, HEADS, max(requests), "cpu")
    arenas.blocks.fill_(1 << 20)
    for index, blocks in enumerate(requests):
        pages = torch.ones(LANES, dtype=torch.int64)
        extra = torch.randint(LANES, (LANES * (blocks - 1),), generator=draw)
        pages += torch.bincount(extra, minlength=LANES)
        ids = torch.randperm(500, generator=draw)[:blocks]
        arenas.put(2 * index, ids, pages.view(LAYERS, HEADS), tail_start_block=WIDTH // 2)
    return arenas


def batch(seq_lens, seed=1):
    draw = torch.Generator().manual_seed(seed)
    table = torch.randperm(1000, generator=draw)[: len(seq_lens) * WIDTH].to(torch.int32)
    return table.view(-1, WIDTH), torch.tensor(seq_lens, dtype=torch.int32)


def filled(arenas, slots, table, seq_lens, first_layer=0, layers=LAYERS, width=3 * WIDTH):
    tables = torch.full((layers, len(slots), HEADS, width), -7, dtype=torch.int32)
    lengths = torch.full((layers, len(slots), HEADS), -7, dtype=torch.int32)
    fill_tables(arenas, slots, table, seq_lens, B, first_layer, tables, lengths)
    return tables, lengths


def check(arenas, slots, table, seq_lens, tables, lengths, first_layer=0):
    for layer in range(len(tables)):
        expected = fill_tables_reference(arenas, slots, table, seq_lens, B, first_layer + layer)
        for row in range(len(slots)):
            for head, (pages, length) in enumerate(expected[row]):
                assert tables[layer, row, head, : len(pages)].tolist() == pages
                assert (tables[layer, row, head, len(pages) :] == -7).all()
                assert lengths[layer, row, head] == length


def test_worked_example():
    """Two blocks 40 and 50, one layer pair of heads: pages 2, 1, 1, 2, 3, 3 in the arena."""
    arenas = Arenas.allocate(1, LAYERS, HEADS, 2, "cpu")
    pages = torch.tensor([[2, 1], [1, 2], [3, 3]])
    arenas.put(0, torch.tensor([40, 50]), pages, tail_start_block=6)
    table, seq_lens = batch([6 * B + 5])
    table[0, 6] = 9
    slots = torch.tensor([0], dtype=torch.int32)
    tables, lengths = filled(arenas, slots, table, seq_lens)
    assert tables[0, 0, 0, :3].tolist() == [240, 241, 9 * 6 + 0]
    assert tables[1, 0, 1, :3].tolist() == [244, 245, 9 * 6 + 3]
    assert tables[2, 0, 0, :4].tolist() == [300, 301, 302, 9 * 6 + 4]
    assert lengths[:, 0].tolist() == [[37, 21], [21, 37], [53, 53]]


def test_mixed_batch_equals_the_page_by_page_reference():
    arenas = arenas_with([1, 3, 2])
    slots = torch.tensor([4, -1, 0, 2, -1, 1], dtype=torch.int32)
    arenas.hold(1, torch.tensor([[7, 7], [7, 7], [2, 3]]), tail_start_block=7)
    table, seq_lens = batch([6 * B + 1, 5, 7 * B, 9 * B + 15, 10 * B, 9 * B - 1])
    tables, lengths = filled(arenas, slots, table, seq_lens)
    check(arenas, slots, table, seq_lens, tables, lengths)


def test_few_programs_write_a_long_table_in_turns(monkeypatch):
    monkeypatch.setattr(tables_module, "BLOCK", 2)
    monkeypatch.setattr(tables_module, "MOST_PROGRAMS", 2)
    arenas = arenas_with([1, 3, 2])
    slots = torch.tensor([4, -1, 2, 0], dtype=torch.int32)
    table, seq_lens = batch([6 * B + 1, 11 * B + 3, 12 * B, 0])
    tables, lengths = filled(arenas, slots, table, seq_lens)
    check(arenas, slots, table, seq_lens, tables, lengths)


def test_room_for_arenas_is_what_they_take():
    arenas = Arenas.allocate(5, LAYERS, HEADS, 7, "cpu")
    parts = (arenas.blocks, arenas.starts, arenas.tails, arenas.held)
    assert Arenas.bytes_of(5, LAYERS, HEADS, 7) == sum(part.nbytes for part in parts)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_one_layer_alone_is_that_layer_of_all(layer):
    arenas = arenas_with([2, 3])
    slots = torch.tensor([0, 2], dtype=torch.int32)
    table, seq_lens = batch([6 * B + 9, 8 * B])
    tables, lengths = filled(arenas, slots, table, seq_lens, layer, layers=1)
    check(arenas, slots, table, seq_lens, tables, lengths, first_layer=layer)


def test_padding_rows_get_length_zero_and_no_page():
    """A captured graph runs on more rows than there are requests."""
    arenas = arenas_with([2])
    slots = torch.tensor([0, 0, -1], dtype=torch.int32)
    table, seq_lens = batch([6 * B + 3, 0, 0])
    tables, lengths = filled(arenas, slots, table, seq_lens)
    assert (lengths[:, 1:] == 0).all() and (tables[:, 1:] == -7).all()
    assert (lengths[:, 0] > 0).all()


def test_replays_on_the_same_memory_follow_the_requests():
    """In place: the same launch, again and again, while tails grow and slots change."""
    arenas = arenas_with([1, 3])
    slots = torch.tensor([0, 2, -1], dtype=torch.int32)
    table, seq_lens = batch([7 * B - 3, 7 * B, 3])
    tables, lengths = filled(arenas, slots, table, seq_lens)
    for step in range(6):
        seq_lens += 1
        if step == 4:
            arenas.clear(0)
            slots[0] = -1
        tables.fill_(-7)
        fill_tables(arenas, slots, table, seq_lens, B, 0, tables, lengths)
        check(arenas, slots, table, seq_lens, tables, lengths)


def test_a_table_as_wide_as_the_natural_one_is_enough():
    """A head keeps at most the prompt's own pages, so kept + tail never exceeds the natural."""
    arenas = Arenas.allocate(1, LAYERS, HEADS, 4, "cpu")
    pages = torch.tensor([[6, 1], [6, 1], [6, 4]])
    arenas.put(0, torch.arange(4), pages, tail_start_block=WIDTH // 2)
    table, seq_lens = batch([WIDTH * B])
    slots = torch.tensor([0], dtype=torch.int32)
    tables, lengths = filled(arenas, slots, table, seq_lens, width=WIDTH)
    check(arenas, slots, table, seq_lens, tables, lengths)
    assert lengths.max() == WIDTH * B


def test_an_arena_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="3 arena blocks, a slot holds 2"):
        Arenas.allocate(1, LAYERS, HEADS, 2, "cpu").put(
            0, torch.arange(3), torch.full((LAYERS, HEADS), 3), tail_start_block=6
        )


@pytest.mark.parametrize("tokens", [0, 1, 7, 300])
def test_head_slots_are_natural_and_skip_padding(tokens):
    table, _ = batch([1] * 5)
    draw = torch.Generator().manual_seed(tokens)
    rows = torch.randint(-1, 5, (tokens,), generator=draw).to(torch.int32)
    positions = torch.randint(0, WIDTH * B, (tokens,), generator=draw)
    out = torch.full((tokens, HEADS), -7, dtype=torch.int64)
    for layer in range(LAYERS):
        args = (table, rows, positions, layer, LAYERS, HEADS, B)
        head_slots(*args, out)
        assert torch.equal(out, head_slots_reference(*args))


def test_head_slots_worked_example():
    table = torch.tensor([[3, 8]], dtype=torch.int32)
    out = torch.empty(2, HEADS, dtype=torch.int64)
    rows = torch.tensor([0, 0], dtype=torch.int32)
    head_slots(table, rows, torch.tensor([5, 17]), 1, LAYERS, HEADS, B, out)
    assert out.tolist() == [[(18 + 2) * 16 + 5, (18 + 3) * 16 + 5], [50 * 16 + 1, 51 * 16 + 1]]
