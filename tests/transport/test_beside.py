"""On a GPU nothing is read before it is written, nor written while it is read, on any stream."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from paging.pools import PACKINGS, layer_views
from transport.races import Streams

from vllm_kvcompress.transport import coders
from vllm_kvcompress.transport.beside import BesideDevice
from vllm_kvcompress.transport.container import parse
from vllm_kvcompress.transport.pages import CachePages, together
from vllm_kvcompress.transport.settings import ConnectorSettings

BLOCKS, LAYERS, HEADS, TOKENS, SIZE = 6, 2, 2, 16, 8
SOME = torch.tensor([1, 2])


@pytest.fixture(params=["cpu", "cuda"])
def gpu(request, monkeypatch) -> Iterator[SimpleNamespace]:
    """Pages, and a coder that believes they are on a device with streams."""
    library = request.getfixturevalue("cuda_on_this_cpu") if request.param == "cuda" else None
    monkeypatch.setattr(coders, "library_for", lambda device: library)
    views = layer_views(BLOCKS, LAYERS, HEADS, TOKENS, SIZE)
    pages = CachePages(views, lambda: PACKINGS["linear"](TOKENS, SIZE))
    (cache,) = pages._parts = together(views)
    pages.write(range(BLOCKS), torch.randn(pages.shape(BLOCKS)))
    stored = torch.randn(pages.shape(2))
    streams = Streams(cache)
    device = BesideDevice(pages.device, streams)
    monkeypatch.setattr(coders, "beside", lambda device_of_pages: device)
    coder = coders.coder(ConnectorSettings(store="memory"), None, pages)
    data = coder.codec.encode(
        coders.as_bits(stored) if library else stored.numpy(), "float32", 4, heads=HEADS
    )
    with streams:
        yield SimpleNamespace(
            streams=streams, cache=cache, coder=coder, stored=stored, container=parse(data)
        )


def compute(gpu, value: float) -> None:
    """A step writes to the blocks."""
    gpu.cache[SOME] = torch.full((2, *gpu.cache.shape[1:]), value)


def test_what_is_saved_is_what_the_step_computed_though_the_next_overwrites_it(gpu):
    compute(gpu, 1.0)
    taken = gpu.coder.take(SOME.tolist())
    compute(gpu, 2.0)
    with gpu.streams.in_thread("save"):
        landed = gpu.coder.land(taken)
        if landed is not taken:  # the CPU's codec reads it, unseen
            gpu.streams.touch([landed.__array_interface__["data"][0]], [])
        gpu.coder.encode(landed, 4, "k")
        assert taken.kv.eq(1).all()


def test_a_load_is_ordered_behind_the_last_owner_and_before_the_first_reader(gpu):
    compute(gpu, 1.0)
    ours = gpu.coder.beside.fence()
    with gpu.streams.in_thread("load"):
        gpu.coder.place(gpu.container, SOME.tolist(), slice(0, 2 * TOKENS), ours)
    gpu.streams.joined("load")
    found = gpu.coder.pages.read(SOME.tolist())
    assert torch.equal(found, gpu.stored)


def test_the_detector_finds_what_these_orders_prevent(gpu):
    early = gpu.coder.beside.fence()
    compute(gpu, 1.0)
    with gpu.streams.in_thread("load"), pytest.raises(AssertionError, match="behind compute"):
        gpu.coder.place(gpu.container, SOME.tolist(), slice(0, 2 * TOKENS), early)
    with gpu.streams.in_thread("save"), pytest.raises(AssertionError, match="behind compute"):
        gpu.coder.pages.read(SOME.tolist())
    ours = gpu.coder.beside.fence()
    with gpu.streams.in_thread("load"):
        gpu.coder.place(gpu.container, SOME.tolist(), slice(0, 2 * TOKENS), ours)
    with pytest.raises(AssertionError, match="behind stream"):
        gpu.coder.pages.read(SOME.tolist())
