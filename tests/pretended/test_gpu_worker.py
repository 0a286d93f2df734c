"""vLLM's GPU worker with compression: memory profile, captured graphs, async scheduling, decode,
CacheGen's store."""

from contextlib import contextmanager
from random import Random

import pytest
import torch
from engine.engines import (
    DEMO_MODEL,
    ask,
    compressor_of,
    counted,
    greedy,
    prompt,
    propagation_of,
    runner_of,
    worker_of,
)
from vllm import LLM, envs
from vllm.config import CUDAGraphMode
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.distributed.kv_transfer.kv_transfer_state import ensure_kv_transfer_shutdown
from vllm.v1.worker.gpu_worker import Worker

from vllm_kvcompress.bench.gpu.recorded import CUDAGraph
from vllm_kvcompress.engine.device_compressor import DeviceCompressor
from vllm_kvcompress.engine.worker import PerHeadWorker

SAID = 5
RUNNERS = {"0": "vllm.v1.worker.gpu_model_runner", "1": "vllm.v1.worker.gpu.model_runner"}
TSP = {"kv_compress": "tsp"}


@contextmanager
def beside_another_rank(llm, monkeypatch):
    """As in data parallelism beside a rank that decodes four requests at all times.

    Steps agree with it on graphs and padding, and between any two runs a batch made up for its
    sake.
    """
    worker = worker_of(llm)
    execute_model = worker.execute_model
    graph, tokens = CUDAGraphMode.FULL.value, 4
    of_first, of_second = [tokens, tokens, 0, graph], [tokens, graph, 1, 1, 0, tokens]

    def all_reduce(tensor, group=None):
        vote = of_first if len(tensor) == len(of_first) else of_second
        tensor[:, 1] = torch.tensor(vote, dtype=tensor.dtype)

    def after_a_made_up_one(step):
        worker.execute_dummy_batch()
        return execute_model(step)

    parallel = llm.llm_engine.vllm_config.parallel_config
    with monkeypatch.context() as patched:
        patched.setattr(parallel, "data_parallel_size", 2)
        patched.setattr(parallel, "disable_nccl_for_dp_synchronization", True)
        patched.setattr(torch.distributed, "all_reduce", all_reduce)
        patched.setattr(worker, "execute_model", after_a_made_up_one)
        yield


def record(monkeypatch, kind, name, results):
    """Append what the method returns."""
    method = getattr(kind, name)

    def recorded(self):
        results.append(method(self))
        return results[-1]

    monkeypatch.setattr(kind, name, recorded)


@pytest.mark.parametrize("second", ["0", "1"], ids=["first runner", "second runner"])
def test_graphs_steps_without_graphs_and_a_loaded_prompt_say_the_same(
    second, monkeypatch, tmp_path
):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", second)
    envs.disable_envs_cache()
    ensure_kv_transfer_shutdown()
    sizes = {"cudagraph_capture_sizes": [1, 2, 4]}
    store = {"store": str(tmp_path), "levels": [4], "chunk_tokens": 32}
    profiled, left = [], []
    record(monkeypatch, Worker, "determine_available_memory", profiled)
    record(monkeypatch, PerHeadWorker, "determine_available_memory", left)
    llm = LLM(
        model=DEMO_MODEL,
        dtype="bfloat16",
        block_size=16,
        max_model_len=512,
        max_num_batched_tokens=64,
        max_num_seqs=4,
        num_gpu_blocks_override=60,
        enable_prefix_caching=False,
        attention_backend="FLASH_ATTN",
        kernel_config={"enable_jit_warmup": False},  # of kernels the interpreter cannot run
        compilation_config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", **sizes},
        additional_config={"kv_compress": {"rate": 4, "window_tokens": 8, "cachegen": store}},
    )
    assert llm.llm_engine.vllm_config.scheduler_config.async_scheduling
    assert profiled[0] - left[0] > (512 + 20) << 20, (
        "the store's buffer, and what compressing takes"
    )
    runner, compressor = runner_of(llm), compressor_of(llm)
    assert type(runner).__module__ == RUNNERS[second]
    assert isinstance(compressor, DeviceCompressor)
    rng, replays, replay = Random(3), [], CUDAGraph.replay

    def replayed(graph):
        selecting = compressor._in_step and compressor.propagating
        assert not selecting, "a graph has all tokens go through all layers"
        replays.append(replay(graph))

    monkeypatch.setattr(CUDAGraph, "replay", replayed)
    prompts = [prompt(rng, 100), prompt(rng, 7), prompt(rng, 70)]

    def asked(knobs):
        return [greedy(SAID, knobs), greedy(3 * SAID, knobs), greedy(SAID, TSP | knobs)]

    with (
        counted(compressor, "_compress") as compressions,
        counted(compressor, "_hold") as held,
        counted(propagation_of(llm), "_go_on") as selections,
    ):
        captured = ask(llm, prompts, asked({}))
    assert (len(compressions), len(held), len(selections)) == (1, 1, 1)
    assert len(replays) >= SAID - 2
    replays.clear()
    with (
        beside_another_rank(llm, monkeypatch),
        counted(compressor, "_compress") as compressions,
        counted(worker_of(llm)._scratch, "enter") as batches,
    ):
        beside = ask(llm, prompts[:2], greedy(SAID, {"cachegen_level": 0}))
    assert [one.tokens for one in beside] == [one.tokens[:SAID] for one in captured[:2]]
    assert len(compressions) == 1
    assert any(rows and count == 4 for rows, count in batches), "padded to the other rank's"
    assert any(not rows and count == 4 for rows, count in batches), "made up"
    assert len(replays) >= 2 * (SAID - 2)
    replays.clear()
    monkeypatch.setattr(DeviceCompressor, "keeps_queries", True)  # such steps are not replayed
    eager = ask(llm, prompts, asked({"cachegen_level": 0}))
    assert not replays
    assert [one.tokens for one in captured] == [one.tokens for one in eager]
    get_kv_transfer_group().transfers.flush(30)
    (loaded,) = ask(llm, prompts[:1], greedy(SAID))
    assert loaded.cached_tokens == 80, "the window is computed"
    assert loaded.tokens == captured[0].tokens
    compressor.check_integrity()
    ensure_kv_transfer_shutdown()
