"""What the tables on a device say of a request is what the CPU's say."""

import numpy as np
import torch
from paging import pools

from vllm_kvcompress.kernels import fill_tables
from vllm_kvcompress.paging.device_tables import DeviceTables
from vllm_kvcompress.paging.pool import PagePool
from vllm_kvcompress.paging.tables import PageTables

LAYERS, HEADS, B, WIDTH = 3, 2, 16, 9
LANES = LAYERS * HEADS


class Both:
    """The tables of both kinds; the natural blocks of request i are 10*i+1, 10*i+2, ..."""

    def __init__(self):
        pool = PagePool(pools.layer_views(100, LAYERS, HEADS, B, 2), pools.linear(B, 2))
        self.tables = PageTables(pool), DeviceTables(pool, 3, WIDTH)

    def enter(self, request_id, pages, arena_blocks, tail_start):
        for tables in self.tables:
            tables.enter(request_id, torch.tensor(pages), torch.tensor(arena_blocks), tail_start)

    def hold(self, request_id, pages, blocks):
        for tables in self.tables:
            tables.hold(request_id, torch.tensor(pages), natural(int(request_id))[:blocks])

    def remove(self, request_id):
        for tables in self.tables:
            tables.remove(request_id)

    def check(self, ends):
        """All (layer, head) of the requests that have so many tokens at the end of a step."""
        cpu, device = self.tables
        names = list(ends)
        table = torch.tensor([natural(int(name)) for name in names], dtype=torch.int32)
        slots = torch.tensor([device.slot(name) for name in names], dtype=torch.int32)
        seq_lens = torch.tensor(list(ends.values()), dtype=torch.int32)
        shape = (LAYERS, len(names), HEADS)
        found = torch.full((*shape, WIDTH), -7, dtype=torch.int32)
        lengths = torch.zeros(shape, dtype=torch.int32)
        fill_tables(device.arenas, slots, table, seq_lens, B, 0, found, lengths)
        at = np.array([cpu.slot(name) for name in names])
        tails = cpu.extend(at, seq_lens.numpy().astype(np.int64), table.tolist().__getitem__)
        assert torch.equal(lengths, cpu.kept[:, at] + tails[:, None])
        used = torch.arange(WIDTH) < (-(-lengths // B))[..., None]
        width = min(WIDTH, cpu.tables.shape[-1])
        expected = cpu.tables[:, at, :, :width][used[..., :width]]
        assert torch.equal(found[used], expected)
        assert (found[~used] == -7).all()
        for tables in self.tables:
            tables.check_integrity()


def natural(request):
    return list(range(10 * request + 1, 10 * request + 1 + WIDTH))


def test_deep_layers_read_fewer_natural_pages_than_shallow_ones():
    both = Both()
    both.hold("0", [[6, 6], [6, 6], [2, 2]], 6)
    both.hold("1", [[3, 3], [1, 1], [1, 1]], 3)
    both.enter("2", [[1, 2], [3, 2], [1, 3]], [50, 60], 5 * B)
    both.check({"1": 3 * B + 1, "0": 6 * B + 5, "2": 5 * B + 2})
    both.check({"0": 8 * B, "1": 3 * B + 30, "2": 9 * B})
    for held in ("0", "1"):
        both.remove(held)
    both.enter("1", [[1, 1], [1, 1], [1, 1]], [70], 4 * B)  # in a slot that held
    both.hold("3", [[4, 4], [0, 0], [0, 0]], 4)
    both.check({"3": 4 * B + 3, "1": 5 * B, "2": 9 * B})


def test_worked_example_of_held_pages():
    """Blocks 1 .. 9, two full ones before the tail, of which the last layer has only the first."""
    both = Both()
    both.hold("0", [[2, 2], [2, 2], [1, 1]], 2)
    device = both.tables[1]
    found = torch.zeros(LAYERS, 1, HEADS, WIDTH, dtype=torch.int32)
    lengths = torch.zeros(LAYERS, 1, HEADS, dtype=torch.int32)
    one = torch.tensor([device.slot("0")], dtype=torch.int32)
    table = torch.tensor([natural(0)], dtype=torch.int32)
    fill_tables(device.arenas, one, table, torch.tensor([2 * B + 3]), B, 0, found, lengths)
    assert found[0, 0, 1, :3].tolist() == [LANES + 1, 2 * LANES + 1, 3 * LANES + 1]
    assert found[2, 0, 0, :2].tolist() == [LANES + 4, 3 * LANES + 4]
    assert lengths[:, 0, 0].tolist() == [2 * B + 3, 2 * B + 3, B + 3]
