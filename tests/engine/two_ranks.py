"""Two tensor-parallel ranks in an engine of their own, started by `test_two_ranks.py`.

Reads the cases as JSON, writes what was said and held.
"""

import json
import sys
import time
from pathlib import Path

from vllm import LLM, SamplingParams

CHUNK = 128


def main(model: str, store: Path, asked: Path, told: Path) -> None:
    cases = json.loads(asked.read_text())
    cachegen = {"store": str(store), "levels": [4], "chunk_tokens": CHUNK}
    llm = LLM(
        model=model,
        dtype="float32",
        enforce_eager=True,
        block_size=32,
        max_model_len=1024,
        max_num_batched_tokens=200,
        num_gpu_blocks_override=200,
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
        additional_config={
            "kv_compress": {"rate": 1, "test_force_arena": True, "cachegen": cachegen}
        },
    )
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler

    def ask(prompts: list, knobs: dict | list, tokens: int) -> list:
        assert llm.reset_prefix_cache()
        each = knobs if isinstance(knobs, list) else [knobs] * len(prompts)
        params = [
            SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, extra_args=own)
            for own in each
        ]
        wrapped = [{"prompt_token_ids": ids} for ids in prompts]
        outputs = llm.generate(wrapped, params, use_tqdm=False)
        scheduler.check_integrity()
        llm.collective_rpc("check_kv_compress_integrity")
        return [[list(output.outputs[0].token_ids), output.num_cached_tokens] for output in outputs]

    def free() -> int:
        return scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    def compressed() -> int:
        counts = scheduler.totals.requests.items()
        return sum(count for (_, outcome), count in counts if outcome == "compressed")

    def stored(rank: str) -> list[Path]:
        return sorted(store.glob(f"*/*/*{rank}.kvc"))

    found = {"free_at_first": free()}

    off, few = {"kv_compress": "off"}, {"kv_compress": "snapkv", "kv_compress_rate": 4}
    prompts = cases["store"]
    found["store"] = [ask(prompts, off, 12)]
    chunks = 2 * sum(len(ids) // CHUNK for ids in prompts)
    give_up = time.monotonic() + 300
    while len(stored("")) < chunks and time.monotonic() < give_up:
        time.sleep(0.05)
    found["store"] += [ask(prompts, off, 12), ask(prompts, few, 12)]
    found["by_rank"] = [[p.name[:64] for p in stored(f"-{rank}-2-4")] for rank in (0, 1)]
    spoilt = stored("-1-2-4")[0]
    spoilt.write_bytes(spoilt.read_bytes()[:-9])
    found["store"].append(ask(prompts, off, 12))

    computed = {"cachegen_level": 0}
    before = compressed()
    found["whole"], found["few"] = (
        ask(cases["arena"], {"kv_compress_rate": rate, **computed}, 30) for rate in (1, 6)
    )
    found["compressed"] = compressed() - before

    prompts, knobs = zip(*cases["propagated"], strict=True)
    found["propagated"] = ask(list(prompts), list(knobs), 20)
    found["free"] = free()
    told.write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))
