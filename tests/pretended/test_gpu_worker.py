"""vLLM's GPU worker with compression: memory profile, captured graphs, async scheduling, decode,
CacheGen's store."""

from random import Random

import pytest
from engine.engines import DEMO_MODEL, ask, compressor_of, counted, greedy, prompt, runner_of
from vllm import LLM
from vllm.distributed.kv_transfer import get_kv_transfer_group

from vllm_kvcompress.bench.gpu.recorded import CUDAGraph
from vllm_kvcompress.engine.device_compressor import DeviceCompressor
from vllm_kvcompress.engine.runners import FULL
from vllm_kvcompress.engine.runners import runner_of as asked_as

SAID = 5


@pytest.mark.timeout(600)
def test_graphs_steps_without_graphs_and_a_loaded_prompt_say_the_same(monkeypatch, tmp_path):
    sizes = {"cudagraph_capture_sizes": [1, 2, 4]}
    store = {"store": str(tmp_path), "levels": [4], "chunk_tokens": 32}
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
        compilation_config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", **sizes},
        additional_config={"kv_compress": {"rate": 4, "window_tokens": 8, "cachegen": store}},
    )
    assert llm.llm_engine.vllm_config.scheduler_config.async_scheduling
    runner, compressor = runner_of(llm), compressor_of(llm)
    assert type(runner).__module__ == "vllm.v1.worker.gpu_model_runner"
    assert isinstance(compressor, DeviceCompressor)
    rng, replays, replay = Random(3), [], CUDAGraph.replay
    monkeypatch.setattr(CUDAGraph, "replay", lambda graph: replays.append(replay(graph)))
    prompts = [prompt(rng, 100), prompt(rng, 7)]
    with counted(compressor, "_compress") as compressions:
        captured = ask(llm, prompts, greedy(SAID))
    assert len(compressions) == 1 and len(replays) >= SAID - 2
    replays.clear()
    with asked_as(runner).without_graphs(FULL):
        eager = ask(llm, prompts, greedy(SAID, {"cachegen_level": 0}))
    assert not replays
    assert [one.tokens for one in captured] == [one.tokens for one in eager]
    get_kv_transfer_group().transfers.flush(30)
    (loaded,) = ask(llm, prompts[:1], greedy(SAID))
    assert loaded.cached_tokens == 80, "the window is computed"
    assert loaded.tokens == captured[0].tokens
    compressor.check_integrity()
