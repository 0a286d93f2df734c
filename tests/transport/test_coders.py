"""What is stored does not depend on who codes it, nor on how pages are packed."""

import numpy as np
import pytest
import torch
from paging.pools import PACKINGS, layer_views

from vllm_kvcompress.transport import coders, profile
from vllm_kvcompress.transport.container import parse
from vllm_kvcompress.transport.pages import CachePages, together
from vllm_kvcompress.transport.settings import ConnectorSettings

BLOCKS, LAYERS, HEADS, TOKENS, SIZE = 6, 2, 2, 16, 8


@pytest.fixture
def coder_of(monkeypatch):
    """A coder on pages with the same content, however they are packed."""

    def make(packing, library=None, offline=None, **settings):
        monkeypatch.setattr(coders, "library_for", lambda device: library)
        views = layer_views(BLOCKS, LAYERS, HEADS, TOKENS, SIZE, torch.bfloat16)
        pages = CachePages(views, lambda: PACKINGS[packing](TOKENS, SIZE))
        generator = torch.Generator().manual_seed(1)
        content = torch.randn(pages.shape(BLOCKS), generator=generator).bfloat16()
        pages.write(range(BLOCKS), content)
        assert torch.equal(pages.read(range(BLOCKS)), content)
        return coders.coder(ConnectorSettings(store="memory", **settings), offline, pages)

    return make


@pytest.mark.parametrize("quantiser", ["fixed", "published"])
@pytest.mark.parametrize("with_profile", [False, True], ids=["no profile", "profile"])
def test_stored_bytes_are_the_same_whoever_codes_them(
    coder_of, cuda_on_this_cpu, quantiser, with_profile
):
    rng = np.random.default_rng(0)
    text = rng.integers(0x3F00, 0x4000, (LAYERS, 2, 256, HEADS * SIZE)).astype(np.uint16)
    offline = profile.build(text, "bfloat16", HEADS) if with_profile else None
    on_gpu = coder_of("linear", cuda_on_this_cpu, offline, quantiser=quantiser)
    others = [coder_of(packing, None, offline, quantiser=quantiser) for packing in PACKINGS]
    for level in (1, 4):
        made = [
            coder.encode(coder.land(coder.take([4, 1])), level, "k") for coder in (on_gpu, *others)
        ]
        assert len(set(made)) == 1
        fence, kept = on_gpu.beside.fence(), on_gpu.pages.read([0])
        for coder in (on_gpu, *others):
            coder.place(parse(made[0]), [5], slice(TOKENS, 2 * TOKENS), fence)
        placed = [coder.pages.read([5]) for coder in (on_gpu, *others)]
        assert all(torch.equal(one, placed[0]) for one in placed)
        assert level < 4 or torch.equal(placed[0], on_gpu.pages.read([1]))
        assert torch.equal(on_gpu.pages.read([0]), kept)


def test_the_coder_is_chosen_once_and_named_in_one_line(coder_of, cuda_on_this_cpu, monkeypatch):
    said = []
    monkeypatch.setattr(coders.logger, "info", lambda line, *values: said.append(line % values))
    coder_of("linear", cuda_on_this_cpu)
    coder_of("linear", threads=2)
    on_gpu, on_cpu = said
    assert on_gpu.endswith(f"on cpu by {cuda_on_this_cpu}")
    assert "on the CPU by" in on_cpu and on_cpu.endswith("threads: 2")


@pytest.mark.parametrize("packing", PACKINGS)
def test_layers_of_one_allocation_travel_together_on_a_device(coder_of, packing):
    pages = coder_of(packing).pages
    want = pages.read([4, 2])
    pages._parts = together(pages.layers)
    assert len(pages._parts) == 1
    assert torch.equal(pages.read([4, 2]), want)
    pages.write([1, 3], want)
    assert torch.equal(coder_of(packing).pages.read([4, 2]), pages.read([1, 3]))
    for apart in ([view.clone() for view in pages.layers], pages.layers[::-1], pages.layers[:1]):
        assert [part.shape[1] for part in together(apart)] == [1] * len(apart)
