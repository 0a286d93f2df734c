"""Nothing that a step does mixes the host's tensors with the device's, or waits for the device.

On tensors without contents that believe to be on a GPU: mixing devices raises, and so does asking
for a value. Kernels are launched on nothing, with all their tensors where the pages are.
"""

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime.interpreter import InterpretedFunction
from vllm.config import CUDAGraphMode
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_kvcompress import accounting
from vllm_kvcompress.bench.compression_memory import move, register_device
from vllm_kvcompress.config import EngineConfig
from vllm_kvcompress.engine.attention.triton import TritonEngine
from vllm_kvcompress.engine.device import HeadPathBuilder
from vllm_kvcompress.engine.device_batch import Scratch
from vllm_kvcompress.engine.device_compressor import DeviceCompressor
from vllm_kvcompress.engine.device_judge import DeviceJudge
from vllm_kvcompress.engine.runners import runner_of
from vllm_kvcompress.engine.worker import StepView
from vllm_kvcompress.paging.pool import PageFormat, PagePool
from vllm_kvcompress.presets import shipped_presets

LAYERS, HEADS, GROUP, SIZE, B, BLOCKS, ROWS = 4, 2, 2, 16, 16, 200, 4
PROMPT, WIDTH = 403, 64
WITHOUT_CONTENTS = FakeTensorMode()
PRESETS = sorted(set(shipped_presets()) - {"fastkv-constant"})  # it would keep all of this prompt


@pytest.fixture(scope="module", autouse=True)
def gpu():
    register_device()


class VllmBuilder:
    vllm_config = SimpleNamespace(
        compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode.FULL_DECODE_ONLY)
    )

    def build(self, common_prefix_len, common, fast_build=False):
        return SimpleNamespace()


class Builder(HeadPathBuilder, VllmBuilder):
    pass


@contextmanager
def on_no_device(monkeypatch):
    def launch(kernel, *args, grid, warmup, **kwargs):
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        assert {tensor.device.type for tensor in given} == {"gpu"}, kernel.__name__

    def uploaded(data, device=None, dtype=None, out=None):
        if out is not None:
            return out
        kind = dtype or (data.dtype if isinstance(data, torch.Tensor) else torch.int32)
        return torch.empty(tuple(getattr(data, "shape", [len(data)])), dtype=kind, device=device)

    monkeypatch.setattr(InterpretedFunction, "run", launch)
    for module in ("paging.pool", "engine.batch", "engine.device", "engine.device_batch"):
        monkeypatch.setattr(f"vllm_kvcompress.{module}.async_tensor_h2d", uploaded)
    with WITHOUT_CONTENTS, torch.inference_mode():
        yield


def step(new=(), cached=None, counts=None):
    nobody = SimpleNamespace(req_ids=[])
    return SimpleNamespace(
        finished_req_ids=set(),
        preempted_req_ids=None,
        scheduled_new_reqs=list(new),
        scheduled_cached_reqs=cached or nobody,
        num_scheduled_tokens=counts,
    )


def rows_of(counts, starts):
    """The second of them compressed; `starts` are theirs on the host."""
    rows = len(counts)
    return CommonAttentionMetadata(
        query_start_loc=torch.empty(rows + 1, dtype=torch.int32, device="gpu"),
        query_start_loc_cpu=SimpleNamespace(numpy=lambda: starts),
        seq_lens=torch.empty(rows, dtype=torch.int32, device="gpu"),
        num_reqs=rows,
        num_actual_tokens=sum(counts),
        max_query_len=max(counts),
        max_seq_len=WIDTH * B,
        block_table_tensor=torch.empty(rows, WIDTH, dtype=torch.int32, device="gpu"),
        slot_mapping=torch.empty(sum(counts), dtype=torch.int64, device="gpu"),
    )


@pytest.mark.parametrize("name", PRESETS)
def test_a_request_is_compressed_and_attended(name, monkeypatch):
    config = EngineConfig(preset=name)
    settings = config.settings_or_off(None)
    plan = accounting.plan(PROMPT, B, BLOCKS, settings)
    cache = torch.zeros(BLOCKS, LAYERS, HEADS, B, 2 * SIZE)
    pool = PagePool([cache[:, layer] for layer in range(LAYERS)], PageFormat.by_token(B, SIZE))
    natural = list(range(-(-PROMPT // B)))
    arena = list(range(100, 100 + (plan.arena_blocks if plan.is_point(PROMPT) else 0)))
    runner = SimpleNamespace(input_batch=SimpleNamespace(req_ids=["a", "b", "c"]), requests={})
    steps = [[1, 1, 1], [7, 2, 1]]
    starts = [np.cumsum([0, *counts], dtype=np.int32) for counts in steps]
    with on_no_device(monkeypatch):
        move(pool)
        judge = DeviceJudge(config, pool, SIZE**-0.5)
        compressor = DeviceCompressor(config, pool, judge, ROWS, WIDTH)
        new = SimpleNamespace(
            req_id="b",
            prompt_token_ids=list(range(PROMPT)),
            prompt_embeds=None,
            sampling_params=SimpleNamespace(extra_args=None),
            num_computed_tokens=0,
            block_ids=(natural + arena,),
        )
        compressor.begin_step(step([new], counts={"b": PROMPT}))
        for capture in compressor.captures(["b"], [0, PROMPT]):
            for layer in range(LAYERS):
                capture.take(layer, torch.empty(PROMPT, HEADS * GROUP, SIZE, device="gpu"))
        if compressor.propagating:
            compressor.select("b", natural)
        compressor.finish_step(lambda request_id: natural)
        assert compressor.tables.slot("b") is not None

        builder = Builder()
        builder.step_view = StepView(compressor, runner_of(runner), [])
        builder.scratch = Scratch(ROWS, HEADS, WIDTH, pool.device)
        compressor._in_step = True
        for counts, begin in zip(steps, starts, strict=True):
            heads = builder.build(0, rows_of(counts, begin)).kv_compress.heads
            query = torch.empty(sum(counts), HEADS * GROUP, SIZE, device="gpu")
            impl = SimpleNamespace(scale=SIZE**-0.5, logits_soft_cap=0.0)
            if max(counts) == 1:
                heads.attend(impl, TritonEngine(), pool, 0, query, torch.empty_like(query))
