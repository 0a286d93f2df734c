"""Two tensor-parallel ranks, each with chunks of its own heads."""

import json
import os
import subprocess
import sys
from random import Random

import pytest
from engine.engines import DEMO_MODEL, Answer, ask, assert_same_words, engine, greedy, prompt

pytestmark = pytest.mark.engine
CHUNK = 128

TWO_RANKS = """
import json, sys, time
from pathlib import Path
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    model, store, prompts = sys.argv[1], Path(sys.argv[2]), json.load(open(sys.argv[3]))
    cachegen = {"store": str(store), "levels": [4], "chunk_tokens": 128}
    llm = LLM(
        model=model, dtype="float32", enforce_eager=True, block_size=32, max_model_len=1024,
        max_num_batched_tokens=512, num_gpu_blocks_override=200, tensor_parallel_size=2,
        distributed_executor_backend="mp",
        additional_config={"kv_compress": {"preset": "cachegen", "cachegen": cachegen}},
    )
    told = []

    def ask(**knobs):
        assert llm.reset_prefix_cache()
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, extra_args=knobs)
        asked = [{"prompt_token_ids": ids} for ids in prompts]
        for output in llm.generate(asked, params, use_tqdm=False):
            told.append([list(output.outputs[0].token_ids), output.num_cached_tokens])

    ask()
    chunks = 2 * sum(len(ids) // 128 for ids in prompts)
    give_up = time.monotonic() + 60
    while len(list(store.glob("*/*/*.kvc"))) < chunks and time.monotonic() < give_up:
        time.sleep(0.05)
    ask()
    ask(kv_compress="snapkv", kv_compress_rate=4)
    by_rank = [sorted(p.name[:64] for p in store.glob(f"*/*/*-{rank}-2-4.kvc")) for rank in (0, 1)]
    spoilt = min(store.glob("*/*/*-1-2-4.kvc"))
    spoilt.write_bytes(spoilt.read_bytes()[:-9])
    ask()
    pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    free = pool.get_num_free_blocks()
    json.dump({"told": told, "by_rank": by_rank, "free": free}, open(sys.argv[4], "w"))
"""


@pytest.mark.timeout(600)
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two ranks want two cores")
def test_two_ranks_store_and_load_their_own_heads(tmp_path):
    prompts = [prompt(Random(30), n) for n in (300, 400)]
    asked, told = tmp_path / "asked.json", tmp_path / "told.json"
    (tmp_path / "run.py").write_text(TWO_RANKS)
    asked.write_text(json.dumps(prompts))
    settings = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(
        [sys.executable, "run.py", DEMO_MODEL, str(tmp_path / "kv"), str(asked), str(told)],
        env={**os.environ, **settings},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(told.read_text())
    plain = ask(engine(), prompts, greedy(12))
    said, cached = zip(*result["told"], strict=True)
    for turn in (0, 1, 3):
        answers = [
            Answer(p, w) for p, w in zip(prompts, said[2 * turn : 2 * turn + 2], strict=True)
        ]
        assert_same_words(answers, plain)
    assert cached[:4] == (0, 0, 256, 384)
    assert result["by_rank"][0] == result["by_rank"][1]
    assert result["free"] == 199
