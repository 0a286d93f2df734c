"""Page tables against a model made of dictionaries and lists."""

import random
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paging import pools

from vllm_kvcompress.paging.pool import PagePool
from vllm_kvcompress.paging.tables import PageTables

LAYERS, HEADS, TOKENS, BLOCKS = 2, 3, 16, 400


@dataclass
class Row:
    """One request as the tables should know it."""

    arena: list[list[list[int]]]  # [L][H] page ids
    blocks: list[int]  # arena blocks
    natural: list[int]
    tail_start: int
    entered: int = 0
    freed: list[int] = field(default_factory=list)

    def pages(self, layer, head):
        first = self.tail_start // TOKENS
        tail = self.natural[first : first + self.entered]
        return self.arena[layer][head] + [
            block * LAYERS * HEADS + layer * HEADS + head for block in tail
        ]


class Model:
    """The tables and their model side by side."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        pool = PagePool(
            pools.layer_views(BLOCKS, LAYERS, HEADS, TOKENS, 2), pools.linear(TOKENS, 2)
        )
        self.pool, self.tables = pool, PageTables(pool)
        self.rows: dict[str, Row] = {}
        self.free = list(range(1, BLOCKS))
        self.count = 0

    def take(self, count):
        self.rng.shuffle(self.free)
        taken, self.free = self.free[:count], self.free[count:]
        return taken

    def put(self, again=None):
        blocks = self.take(self.rng.randint(1, 5))
        lanes = LAYERS * HEADS
        counts = [1] * lanes
        for _ in range((len(blocks) - 1) * lanes):
            favourite = self.rng.choice([0, self.rng.randrange(lanes)])
            counts[favourite] += 1
        pages = [block * lanes + lane for block in blocks for lane in range(lanes)]
        self.rng.shuffle(pages)
        deal = iter(pages)
        arena = [
            [[next(deal) for _ in range(counts[layer * HEADS + head])] for head in range(HEADS)]
            for layer in range(LAYERS)
        ]
        if again is None:
            name, self.count = f"r{self.count}", self.count + 1
            start_block = self.rng.randint(0, 6)
            natural = [0] * start_block + self.take(self.rng.randint(0, 1))
        else:
            name, old = again, self.rows[again]
            start_block = old.tail_start // TOKENS + self.rng.randint(0, old.entered)
            self.free += old.blocks + old.natural[old.tail_start // TOKENS : start_block]
            natural = [0] * start_block + old.natural[start_block:]
        ids = torch.tensor(pages)
        counted = torch.tensor(counts).view(LAYERS, HEADS)
        slot = self.tables.put(name, counted, ids, start_block * TOKENS)
        assert self.tables.slot(name) == slot
        self.rows[name] = Row(arena, blocks, natural, start_block * TOKENS)

    def remove(self, name):
        self.tables.remove(name)
        row = self.rows.pop(name)
        self.free += row.blocks + [block for block in row.natural if block]

    def extend(self, names):
        slots, ends, natural = [], [], []
        for name in names:
            row = self.rows[name]
            end = row.tail_start + row.entered * TOKENS + self.rng.choice([1, 5, TOKENS, 40])
            want = -(-end // TOKENS)
            row.natural += self.take(max(0, want - len(row.natural)))
            row.entered = max(row.entered, want - row.tail_start // TOKENS)
            slots.append(self.tables.slot(name))
            ends.append(end)
            natural.append(row.natural)
        tails = self.tables.extend(np.array(slots), np.array(ends), natural.__getitem__)
        expected = [end - self.rows[name].tail_start for name, end in zip(names, ends, strict=True)]
        assert tails.tolist() == expected

    def check(self):
        self.tables.check_integrity()
        assert len(self.tables) == len(self.rows)
        assert sorted(self.tables.requests()) == sorted(self.rows)
        slots = sorted(self.tables.slot(name) for name in self.rows)
        assert slots == list(range(len(self.rows))), "slots are not dense"
        for name, row in self.rows.items():
            slot = self.tables.slot(name)
            assert self.tables.requests()[slot] == name
            counts, arena = self.tables.arena(name)
            for layer in range(LAYERS):
                for head in range(HEADS):
                    expected = row.pages(layer, head)
                    got = self.tables.tables[layer, slot, head, : len(expected)].tolist()
                    assert got == expected, f"{name} layer {layer} head {head}"
                    kept = row.arena[layer][head]
                    assert int(self.tables.kept[layer, slot, head]) == len(kept) * TOKENS
                    assert int(counts[layer, head]) == len(kept)
                    padded = arena[layer, head].tolist()
                    assert padded[: len(kept)] == kept and not any(padded[len(kept) :])

    def step(self):
        names = list(self.rows)
        self.rng.shuffle(names)
        chance = self.rng.random()
        if not names or (chance < 0.3 and len(self.free) > 60):
            self.put()
        elif chance < 0.45 or len(self.free) < 40:
            self.remove(names[0])
        elif chance < 0.55:
            self.put(again=names[0])
        else:
            self.extend(names[: self.rng.randint(1, len(names))])


@given(st.integers(0, 2**32))
@settings(max_examples=12)
def test_tables_hold_what_a_model_of_lists_holds(seed):
    model = Model(seed)
    for _ in range(60):
        model.step()
        model.check()


def test_forgetting_an_unknown_request_changes_nothing():
    model = Model(0)
    model.put()
    model.tables.remove("nobody")
    assert model.tables.slot("nobody") is None
    model.check()


def test_a_request_can_come_back_after_it_was_forgotten():
    model = Model(1)
    for _ in range(4):
        model.put()
    model.extend(["r1", "r3"])
    model.remove("r0")
    model.check()
    model.extend(["r3"])
    model.check()


@pytest.mark.parametrize("where", ["two heads", "two requests", "arena and tail"])
def test_integrity_check_catches_a_page_in_two_tables(where):
    model = Model(2)
    for _ in range(3):
        model.put()
    model.extend(["r0", "r1", "r2"])
    model.check()
    tables = model.tables.tables
    if where == "two heads":
        tables[0, 1, 0, 0] = tables[0, 1, 1, 0]
    elif where == "two requests":
        tables[1, 0, 2, 0] = tables[1, 2, 2, 0]
    else:
        kept = len(model.rows["r0"].arena[0][0])
        slot = model.tables.slot("r0")
        tables[0, slot, 0, kept] = tables[0, slot, 0, 0]
    with pytest.raises(RuntimeError, match="name only"):
        model.tables.check_integrity()
