"""What requests may ask for beside compression works with it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from engine import dense
from engine.engines import (
    BLOCK,
    Answer,
    answers,
    ask,
    assert_all_free,
    assert_same_words,
    engine,
    free_blocks,
    greedy,
    prompt,
    steps,
)

pytestmark = pytest.mark.engine


def test_more_logprobs_are_those_of_the_kept_tokens():
    llm = engine({"rate": 4}, step_tokens=256)
    params = greedy(20)
    params.logprobs = 12
    watch = dense.Watch(llm)
    llm.llm_engine.add_request("p", {"prompt_token_ids": prompt(Random(1), 300)}, params)
    done = [output for finished in steps(llm, watch) for output in finished]
    (answer,) = answers(done)
    assert all(len(step) >= 12 for step in answer.logprobs)
    dense.check(answer, watch.of("p"))


def test_prompt_logprobs_see_the_whole_prompt():
    rng = Random(2)
    ids = [prompt(rng, n) for n in (40, 200, 500)]
    params = greedy(3, prompt_logprobs=1)

    def of(llm):
        outputs = llm.generate([{"prompt_token_ids": p} for p in ids], params, use_tqdm=False)
        return [
            [{t: q.logprob for t, q in step.items()} for step in output.prompt_logprobs[1:]]
            for output in outputs
        ]

    plain, compressed = of(engine()), of(engine({"rate": 8}, step_tokens=256))
    for mine, theirs in zip(compressed, plain, strict=True):
        assert len(mine) == len(theirs)
        for got, want in zip(mine, theirs, strict=True):
            for token in got.keys() & want.keys():
                assert abs(got[token] - want[token]) < 1e-4


def test_stop_strings_and_stop_tokens_end_a_compressed_request():
    llm = engine({"rate": 4}, step_tokens=256)
    initial, ids = free_blocks(llm), prompt(Random(3), 310)
    (whole,) = ask(llm, [ids], greedy(60))
    stop = whole.text[20:24]
    assert len(stop) == 4
    (cut,) = ask(llm, [ids], greedy(60, stop=[stop]))
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.tokens == whole.tokens[: len(cut.tokens)]
    token = whole.tokens[10]
    (cut,) = ask(llm, [ids], greedy(60, stop_token_ids=[token]))
    assert cut.tokens == whole.tokens[: whole.tokens.index(token) + 1]
    assert_all_free(llm, initial)


def test_a_request_that_only_wants_one_token_is_done_before_its_sources_are_freed():
    llm = engine({"rate": 4}, step_tokens=256)
    initial = free_blocks(llm)
    rng = Random(4)
    said = ask(llm, [prompt(rng, n) for n in (64, 96, 320, 321)], greedy(1))
    assert [len(answer.tokens) for answer in said] == [1, 1, 1, 1]
    assert_all_free(llm, initial)


def test_cached_prefixes_can_be_dropped_while_requests_are_compressed():
    llm = engine({"rate": 4}, step_tokens=256)
    initial, ids = free_blocks(llm), prompt(Random(5), 320)
    (first,) = ask(llm, [ids], greedy(30))
    assert llm.reset_prefix_cache()
    (again,) = ask(llm, [ids], greedy(30))
    assert again.cached_tokens == 0 and again.tokens == first.tokens
    assert_all_free(llm, initial)


TWO_RANKS = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    model, prompts = sys.argv[1], json.load(open(sys.argv[2]))
    llm = LLM(
        model=model, dtype="float32", enforce_eager=True, block_size=32, max_model_len=1024,
        max_num_batched_tokens=200, num_gpu_blocks_override=200, tensor_parallel_size=2,
        distributed_executor_backend="mp",
        additional_config={"kv_compress": {"rate": 1, "test_force_arena": True}},
    )
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    initial = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    told = {}
    for rate in (1, 6):
        params = SamplingParams(
            temperature=0, max_tokens=30, ignore_eos=True, extra_args={"kv_compress_rate": rate}
        )
        asked = [{"prompt_token_ids": ids} for ids in prompts]
        outputs = llm.generate(asked, params, use_tqdm=False)
        told[rate] = [list(output.outputs[0].token_ids) for output in outputs]
        scheduler.check_integrity()
        llm.collective_rpc("check_kv_compress_integrity")
    free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    counts = scheduler.totals.snapshot()
    json.dump(
        {"told": told, "initial": initial, "free": free, "counts": counts["requests"]},
        open(sys.argv[3], "w"),
    )
"""


@pytest.mark.timeout(600)
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two ranks want two cores")
def test_two_tensor_parallel_ranks_agree_on_every_block(tmp_path):
    rng = Random(6)
    prompts = [prompt(rng, n) for n in (20, 96, 250, 320, 333)]
    script, asked, told = tmp_path / "run.py", tmp_path / "asked.json", tmp_path / "told.json"
    script.write_text(TWO_RANKS)
    asked.write_text(json.dumps(prompts))
    model = engine().llm_engine.vllm_config.model_config.model
    settings = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(Path(model)), str(asked), str(told)],
        env={**os.environ, **settings},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(told.read_text())
    assert result["free"] == result["initial"]
    assert (
        sum(n for (_, outcome), n in map(split, result["counts"]) if outcome == "compressed") == 8
    )
    plain = ask(engine(), prompts, greedy(30))
    whole = [Answer(ids, words) for ids, words in zip(prompts, result["told"]["1"], strict=True)]
    assert assert_same_words(whole, plain) <= 1
    few = result["told"]["6"]
    changed = sum(a != b.tokens for a, b in zip(few, plain, strict=True) if len(b.prompt) > BLOCK)
    assert [len(words) for words in few] == [30] * 5 and changed


def split(row):
    """`[preset, outcome, count]` as `(preset, outcome), count`."""
    return tuple(row[:-1]), row[-1]
