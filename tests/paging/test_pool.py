"""The cache as pages: any packing is found out, any token reaches the page it was meant for."""

import random

import pytest
import torch
from paging import pools

from vllm_kvcompress.paging import pool as pool_module
from vllm_kvcompress.paging.pool import PageFormat, PagePool


def write_as(form):
    def write(keys, values, page):
        flat = page.view(-1)
        flat[form.keys] = keys[:, 0]
        flat[form.values] = values[:, 0]

    return write


@pytest.mark.parametrize("packing", pools.PACKINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "size"), [(16, 64), (32, 32), (16, 8), (128, 128)])
def test_probe_finds_the_packing(packing, dtype, tokens, size):
    expected = pools.PACKINGS[packing](tokens, size)
    found = PageFormat.probe(write_as(expected), tokens, size, dtype)
    assert torch.equal(found.keys, expected.keys)
    assert torch.equal(found.values, expected.values)


def test_probe_finds_a_random_permutation():
    order = torch.randperm(2 * 32 * 32, generator=torch.Generator().manual_seed(1))
    expected = PageFormat(order[:1024].view(32, 32), order[1024:].view(32, 32))
    found = PageFormat.probe(write_as(expected), 32, 32, torch.bfloat16)
    assert torch.equal(found.keys, expected.keys)
    assert torch.equal(found.values, expected.values)


@pytest.mark.parametrize("lost", ["a value", "all keys"])
def test_probe_refuses_a_kernel_that_loses_elements(lost):
    form = pools.linear(16, 8)

    def write(keys, values, page):
        write_as(form)(keys, values, page)
        if lost == "a value":
            page.view(-1)[form.values[3, 5]] = page.view(-1)[form.values[3, 4]]
        else:
            page.view(-1)[form.keys] = 0

    with pytest.raises(RuntimeError, match="not a permutation"):
        PageFormat.probe(write, 16, 8, torch.float32)


def test_pages_are_numbered_block_layer_head():
    views = pools.layer_views(5, 3, 2, 16, 8)
    pool = PagePool(views, pools.linear(16, 8))
    assert (pool.num_layers, pool.num_heads, pool.num_blocks) == (3, 2, 5)
    assert (pool.page_tokens, pool.head_size, pool.pages_per_block) == (16, 8, 6)
    for layer, view in enumerate(views):
        assert pool.layer_of(view) == layer
    blocks = torch.tensor([4, 1])
    pages = pool.page_ids(blocks)
    assert pages.shape == (3, 2, 2)
    for layer, view in enumerate(views):
        for head in range(2):
            for i, block in enumerate(blocks.tolist()):
                view[block, head] = 100 * layer + 10 * head + block
                assert pool.cache[pages[layer, head, i]].unique().tolist() == [
                    100 * layer + 10 * head + block
                ]
    assert sorted(pool.block_pages(blocks).tolist()) == sorted(pages.flatten().tolist())
    assert pool.block_pages(blocks)[:6].tolist() == list(range(24, 30))


def test_layers_are_told_apart_by_their_offset_whatever_their_order():
    views = pools.layer_views(4, 3, 2, 16, 8)
    pool = PagePool([views[2], views[0], views[1]], pools.linear(16, 8))
    assert [pool.layer_of(view) for view in views] == [0, 1, 2]


def test_a_pool_may_start_inside_an_allocation():
    page, layers, heads = 16 * 16, 2, 2
    flat = torch.zeros(100 + 4 * layers * heads * page)
    stride = (layers * heads * page, page, 16, 1)
    views = [
        flat.as_strided((4, heads, 16, 16), stride, 100 + layer * heads * page)
        for layer in range(layers)
    ]
    pool = PagePool(views, pools.linear(16, 8))
    views[1][3, 1] = 7
    assert pool.cache[pool.page_ids(torch.tensor([3]))[1, 1, 0]].eq(7).all()
    assert [pool.layer_of(view) for view in views] == [0, 1]


@pytest.mark.parametrize("wrong", ["layer outermost", "a layer missing", "tokens before heads"])
def test_other_layouts_are_refused(wrong):
    if wrong == "layer outermost":
        views = [torch.zeros(4, 2, 16, 16) for _ in range(3)]
    elif wrong == "a layer missing":
        views = pools.layer_views(4, 3, 2, 16, 8)[::2]
    else:
        whole = torch.zeros(4, 3, 16, 2, 16)
        views = [whole[:, layer].transpose(1, 2) for layer in range(3)]
    with pytest.raises(RuntimeError, match="not one pool of pages"):
        PagePool(views, pools.linear(16, 8))


@pytest.mark.parametrize("packing", pools.PACKINGS)
def test_reading_pages_gives_every_token_in_order(packing):
    pool, keys, values = pools.filled_pool(6, 2, 2, 16, 8, packing)
    pages = torch.tensor([[3, 0, 17], [5, 5, 2]])
    assert torch.equal(pool.keys(pages), keys[pages].flatten(1, 2))
    assert torch.equal(pool.values(pages), values[pages].flatten(1, 2))


@pytest.mark.parametrize("packing", pools.PACKINGS)
@pytest.mark.parametrize("pages_at_once", [1, 3, 1000])
def test_copying_tokens_equals_copying_one_by_one(packing, pages_at_once, monkeypatch):
    tokens, size = 16, 8
    monkeypatch.setattr(pool_module, "COPY_ELEMENTS", pages_at_once * tokens * 2 * size + 1)
    rng = random.Random(pages_at_once)
    for _ in range(5):
        pool, keys, values = pools.filled_pool(8, 2, 3, tokens, size, packing)
        pages = list(range(48))
        rng.shuffle(pages)
        targets, origins = pages[: rng.randint(1, 20)], pages[20:]
        slots = [
            rng.choice(origins) * tokens + rng.randrange(tokens)
            for _ in range(len(targets) * tokens)
        ]
        at = torch.tensor(slots)
        pool.copy_tokens(at // tokens, at % tokens, torch.tensor(targets))
        for i, slot in enumerate(slots):
            where = targets[i // tokens], i % tokens
            keys[where] = keys[slot // tokens, slot % tokens]
            values[where] = values[slot // tokens, slot % tokens]
        every = torch.arange(48)[:, None]
        assert torch.equal(pool.keys(every), keys)
        assert torch.equal(pool.values(every), values)
