"""Compressing on a device asks it nothing, first and again, and keeps what the host's way keeps."""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from interpreted.device import (
    DEVICE,
    Device,
    DeviceTensor,
    NoWaiting,
    Waits,
    device_in_place_of_cuda,
    memory_of,
)
from kernels.caches import noise
from torch import Tensor

from vllm_kvcompress import accounting
from vllm_kvcompress.config import DEFAULT_PRESET, parse_engine_config
from vllm_kvcompress.engine.clock import clock_of
from vllm_kvcompress.engine.compressor import Compressor
from vllm_kvcompress.engine.device_compressor import DeviceCompressor
from vllm_kvcompress.engine.device_judge import DeviceJudge
from vllm_kvcompress.engine.judge import Judge
from vllm_kvcompress.paging import device_tables
from vllm_kvcompress.paging.device_tables import DeviceTables
from vllm_kvcompress.paging.host_copy import HostCopy
from vllm_kvcompress.paging.pool import PageFormat, PagePool
from vllm_kvcompress.policy.propagators import select_positions
from vllm_kvcompress.presets import shipped_presets

LAYERS, HEADS, GROUP, SIZE, B, BLOCKS = 2, 2, 2, 16, 16, 40
PROMPT = 150
EVICTING = sorted(shipped_presets().keys() - {"tsp", "fastkv-constant"})  # from a short prompt

ASKING = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.any()),
    "int": lambda x: int(x.max()),
    "an index": lambda x: x[x[0]],
    "tolist": lambda x: x.cpu().tolist(),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu"),
    "copy_": lambda x: torch.empty(4, dtype=torch.int64).copy_(x),
    "a list": lambda x: x + torch.tensor([1, 2, 3, 4], device=x.device),
    "a number": lambda x: torch.tensor(3, device=x.device),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "a mask": lambda x: x[x > 0],
    "a mask to write": lambda x: x.index_put_((x > 0,), x[:1]),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "unique_consecutive": lambda x: x.unique_consecutive(),
    "bincount": lambda x: x.bincount(),
    "equal": lambda x: torch.equal(x, x),
    "allclose": lambda x: torch.allclose(x, x),
    "repeat_interleave": lambda x: x.repeat_interleave(x),
}
SILENT = {
    "a constant": lambda x: x.masked_fill_(x > 3, 0),
    "assignment": lambda x: x[:2].fill_(7),
    "gather": lambda x: x[x.clamp(max=3)],
    "cumsum": lambda x: x.cumsum(0) + 1,
    "full": lambda x: torch.full((2,), 5, device=x.device),
    "nonzero_static": lambda x: x.nonzero_static(size=2),
    "sort": lambda x: x.sort().values,
    "masked_scatter": lambda x: x.masked_scatter(x > 2, x),
    "repeat_interleave": lambda x: x.repeat_interleave(x, output_size=10),
    "repeat a number of times": lambda x: x.repeat_interleave(2),
    "an asynchronous copy": lambda x: torch.arange(4).to(x.device, non_blocking=True) + x,
    "and back": lambda x: torch.empty(4, dtype=torch.int64).copy_(x, non_blocking=True),
}


def numbers():
    return torch.arange(1, 5, device=DEVICE)


@pytest.mark.parametrize("name", ASKING)
def test_the_watch_sees_who_waits(name) -> None:
    with torch.inference_mode(), Device():
        x = numbers()
        with pytest.raises(Waits):
            ASKING[name](x)


@pytest.mark.parametrize("name", SILENT)
def test_the_watch_lets_pass_what_only_launches(name) -> None:
    with torch.inference_mode(), Device():
        got = SILENT[name](numbers())
    want = SILENT[name](torch.arange(1, 5))
    assert memory_of(got).tolist() == want.tolist()


def test_the_device_does_not_mix_with_the_host() -> None:
    with torch.inference_mode(), Device():
        x = numbers()
        assert isinstance(x, DeviceTensor) and x.device.type != "cpu"
        with pytest.raises(RuntimeError, match="mixes"):
            x + torch.arange(4)
        with pytest.raises((RuntimeError, TypeError)):
            x.numpy()
        x[0] = 9
        assert (x.view(2, 2)[0] * 2).held.tolist() == [18, 4]


def test_plain_tensors_can_be_watched_too() -> None:
    with NoWaiting(), pytest.raises(Waits):
        torch.arange(4)[torch.arange(4) > 1]


class Prompt:
    """The steps of one request as the scheduler tells them, on its own natural blocks."""

    def __init__(self, preset: str, again: bool) -> None:
        slack = {"continual": True, "continual_slack_blocks": 2} if again else {}
        self.config = parse_engine_config({"preset": preset, "rate": 3, **slack})
        settings = self.config.settings_or_off(None)
        self.plan = accounting.plan(PROMPT, B, BLOCKS, settings)
        self.points = [PROMPT]
        while again and len(self.points) < 3:
            self.points.append(self.plan.next_point(self.points[-1]))
        self.natural = list(range(1, 2 + self.points[-1] // B))
        self.arenas = range(len(self.natural) + 1, BLOCKS)

    def step(self, index: int) -> SimpleNamespace:
        """All tokens up to the point number `index` at once."""
        start, blocks = self.points[index - 1] if index else 0, self.plan.arena_blocks
        ids = (list(self.arenas[index * blocks : (index + 1) * blocks]),)
        prompt = SimpleNamespace(
            req_id="r",
            prompt_token_ids=[0] * PROMPT,
            prompt_embeds=None,
            sampling_params=SimpleNamespace(extra_args=None),
            num_computed_tokens=0,
            block_ids=ids,
        )
        running = SimpleNamespace(
            req_ids=["r"] if index else [],
            resumed_req_ids=set(),
            new_block_ids=[ids],
            num_computed_tokens=[start],
        )
        return SimpleNamespace(
            finished_req_ids=(),
            preempted_req_ids=None,
            scheduled_new_reqs=[] if index else [prompt],
            scheduled_cached_reqs=running,
            num_scheduled_tokens={"r": self.points[index] - start},
        )


def life(prompt: Prompt, put, compressor_of) -> tuple[list[list], Tensor]:
    """Page counts after each compression, and all pages in the end.

    put: brings a tensor of the host to where the pages are.
    """
    cache = put(noise(BLOCKS, LAYERS, HEADS, B, 2 * SIZE))
    pool = PagePool([cache[:, layer] for layer in range(LAYERS)], PageFormat.by_token(B, SIZE))
    compressor, counts = compressor_of(prompt.config, pool), []
    for index, (start, end) in enumerate(pairwise([0, *prompt.points])):
        compressor.begin_step(prompt.step(index))
        for capture in compressor.captures(["r"], np.array([0, end - start])):
            for layer in range(LAYERS):
                query = noise(end - start, HEADS * GROUP, SIZE, seed=100 * end + layer)
                capture.take(layer, put(query))
        if compressor.propagating:
            compressor.select("r", prompt.natural)
        compressor.finish_step(lambda _: prompt.natural)
        counts.append(kept_pages(compressor.tables))
    return counts, memory_of(pool.cache)


def kept_pages(tables) -> list[int]:
    """By layer and head."""
    if isinstance(tables, DeviceTables):
        return memory_of(tables.arenas.starts[tables.slot("r")]).diff().tolist()
    return tables.arena("r")[0].flatten().tolist()


def on_host(config, pool) -> Compressor:
    return Compressor(config, pool, Judge(config, pool, SIZE**-0.5))


def on_device(config, pool) -> DeviceCompressor:
    """The interpreter is slow: of the presets it scores two by the kernel."""
    judge = DeviceJudge if config.preset in (DEFAULT_PRESET, "windowkv") else Judge
    return DeviceCompressor(config, pool, judge(config, pool, SIZE**-0.5), 2, BLOCKS)


@pytest.mark.parametrize("preset", EVICTING)
def test_compressing_waits_for_nobody_and_keeps_what_the_host_would(preset, monkeypatch) -> None:
    """And what the host will want to know is copied to it only where it will."""
    copies = []
    monkeypatch.setattr(device_tables, "HostCopy", lambda t: copies.append(t) or HostCopy(t))
    again = not preset.startswith("windowkv")  # it shares scores, and judges once only
    want_counts, want_pages = life(Prompt(preset, again), lambda tensor: tensor, on_host)
    with torch.inference_mode(), device_in_place_of_cuda():
        counts, pages = life(Prompt(preset, again), DeviceTensor, on_device)
    assert len(counts) == (3 if again else 1) and counts == want_counts
    assert len(copies) == (3 if again else 0)
    assert torch.equal(pages, want_pages)


def test_selecting_positions_waits_for_nobody() -> None:
    saliency = noise(200).masked_fill_(torch.arange(200) % 7 == 0, torch.nan)
    with torch.inference_mode(), Device():
        got = select_positions(DeviceTensor(saliency), 50, 20)
    assert torch.equal(got.held, select_positions(saliency, 50, 20))


def test_times_are_read_when_they_are_there(monkeypatch) -> None:
    now, passed = 0, 0

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            nonlocal now
            now += 250
            self.at = now

        def query(self) -> bool:
            return self.at <= passed

        def elapsed_time(self, end: "Event") -> float:
            return float(end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = clock_of(torch.device("cuda"))
    for _ in range(3):
        with clock.timed():
            now += 250
    assert clock.take() == []
    passed = 1500
    assert clock.take() == [0.5, 0.5]
    assert clock.take() == []
    passed = 9000
    assert clock.take() == [0.5]
