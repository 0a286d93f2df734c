"""What compression is for: blocks come back, exactly as many as promised, and none gets lost."""

from math import ceil
from random import Random

import pytest
import torch
from engine import dense
from engine.engines import (
    BLOCK,
    answers,
    assert_all_free,
    compressor_of,
    counted,
    engine,
    free_blocks,
    greedy,
    prompt,
    runner_of,
    scheduler_of,
    steps,
)

from vllm_kvcompress.presets import shipped_presets

pytestmark = pytest.mark.engine
PRESET = shipped_presets()["kv-compress"]
WINDOW = PRESET.window_tokens


def expected_blocks(n, rate):
    """`K` and `ceil(t/B)` of the default preset."""
    tail = n % BLOCK
    protected = PRESET.sink_tokens + max(0, PRESET.recent_tokens - tail)
    kept = max(1, ceil(protected / BLOCK), ceil((n / rate - tail) / BLOCK))
    return (ceil(n / BLOCK), 0) if kept >= n // BLOCK else (kept, ceil(tail / BLOCK))


@pytest.mark.parametrize("step_tokens", [1024, 100])
def test_blocks_held_after_prefill_are_k_and_the_tail_for_every_request(step_tokens):
    llm = engine({"rate": 8}, step_tokens=step_tokens)
    scheduler, initial = scheduler_of(llm), free_blocks(llm)
    rng = Random(step_tokens)
    lengths = [1, 31, 32, 33, 64, 96, 97, 1024, 1500] + [rng.randint(1, 900) for _ in range(20)]
    rates = {}
    for i, n in enumerate(lengths):
        rate = rng.choice([2, 4, 8, 16, 2.5])
        rates[f"m{i}"] = rate
        params = greedy(12, {"kv_compress_rate": rate})
        llm.llm_engine.add_request(f"m{i}", {"prompt_token_ids": prompt(rng, n)}, params)
    wrong, seen = [], set()

    def look():
        for request in scheduler.running:
            name, n = request.request_id.split("-")[0], request.num_prompt_tokens
            done = request.num_computed_tokens - n
            if done < 1:
                continue
            seen.add(name)
            kept, tail = expected_blocks(n, rates[name])
            held = scheduler.per_head.blocks_held(request.request_id)
            grown = ceil(request.num_computed_tokens / BLOCK) - ceil(n / BLOCK)
            if held != kept + tail + grown:
                wrong.append((n, rates[name], done, held, kept + tail + grown))
            if done == 1 and not kept + tail <= held <= kept + tail + 1:
                wrong.append((n, rates[name], "right after prefill", held, kept + tail))

    for _ in steps(llm, look):
        pass
    assert not wrong, f"(prompt, rate, decoded, held, promised): {wrong[:5]} of {len(wrong)}"
    assert len(seen) == len(lengths)
    assert_all_free(llm, initial)


def test_freed_blocks_are_there_for_others():
    """More requests run at once than without compression, in the same cache."""
    most = {}
    for rate in (1, 8):
        llm = engine({"rate": 8}, blocks=120, step_tokens=512)
        llm.reset_prefix_cache()
        rng, scheduler, initial = Random(3), scheduler_of(llm), free_blocks(llm)
        for i in range(12):
            params = greedy(80, {"kv_compress_rate": rate})
            llm.llm_engine.add_request(f"f{i}", {"prompt_token_ids": prompt(rng, 1000)}, params)
        at_once = [len(scheduler.running) for _ in steps(llm)]
        most[rate] = max(at_once)
        assert_all_free(llm, initial)
    assert most[8] > 2 * most[1], f"{most[8]} requests at once, {most[1]} without compression"


def test_a_repeated_prompt_hits_and_its_blocks_are_never_written():
    llm = engine({"rate": 4}, step_tokens=256)
    llm.reset_prefix_cache()
    initial, rng = free_blocks(llm), Random(4)
    engine_, pool = llm.llm_engine, compressor_of(llm).pool
    for n in (1000, 300, 96, 33):
        ids = prompt(rng, n)
        said, hit_blocks, before = [], [], None
        for turn in range(3):
            knobs = {"kv_compress": "off"} if turn == 2 else None
            engine_.add_request(f"{n}-{turn}", {"prompt_token_ids": ids}, greedy(50, knobs))
            watch = dense.Watch(llm)
            before = pool.cache.clone()

            def look(turn=turn, watch=watch, n=n, hit_blocks=hit_blocks):
                watch()
                if turn and not hit_blocks:
                    (state,) = runner_of(llm).requests.values()
                    hit_blocks.extend(state.block_ids[0][: max(0, n - WINDOW) // BLOCK])

            done = [output for finished in steps(llm, look) for output in finished]
            (answer,) = answers(done)
            arenas = [arena for name in watch.arenas for arena in watch.arenas[name]]
            dense.check(answer, arenas)
            said.append(answer)
            if turn:
                pages = pool.block_pages(torch.tensor(hit_blocks, dtype=torch.int64))
                same = torch.equal(pool.cache[pages], before[pages])
                assert same, f"a hit block of the {n}-token prompt was written"
        compressed = n // BLOCK > 1
        hits = max(0, n - WINDOW) // BLOCK * BLOCK if compressed else (n - 1) // BLOCK * BLOCK
        assert [a.cached_tokens for a in said] == [0, hits, (n - 1) // BLOCK * BLOCK]
        assert said[0].tokens == said[1].tokens
    assert_all_free(llm, initial)


def test_blocks_that_saw_a_compressed_context_are_not_hit():
    llm = engine({"rate": 8}, step_tokens=256)
    ids = prompt(Random(5), 330)
    (first,) = answers(llm.generate([{"prompt_token_ids": ids}], greedy(150), use_tqdm=False))
    longer = ids + first.tokens + prompt(Random(6), 40)
    (second,) = answers(
        llm.generate(
            [{"prompt_token_ids": longer}], greedy(5, {"kv_compress": "off"}), use_tqdm=False
        )
    )
    assert second.cached_tokens == 330 // BLOCK * BLOCK
    dense.check(second, [])


def test_salted_prompts_do_not_hit_each_other():
    llm = engine({"rate": 4}, step_tokens=256)
    ids = prompt(Random(7), 200)
    cached = []
    for salt in ("a", "b", "a"):
        asked = [{"prompt_token_ids": ids, "cache_salt": salt}]
        (answer,) = answers(llm.generate(asked, greedy(3), use_tqdm=False))
        cached.append(answer.cached_tokens)
    assert cached == [0, 0, (200 - WINDOW) // BLOCK * BLOCK]


@pytest.mark.parametrize("moment", ["waiting", "mid prefill", "just compressed", "mid decode"])
def test_an_aborted_request_gives_everything_back(moment):
    llm = engine({"rate": 4}, step_tokens=100)
    llm.reset_prefix_cache()
    initial, rng, scheduler = free_blocks(llm), Random(8), scheduler_of(llm)
    wanted = {"waiting": 0, "mid prefill": 3, "just compressed": 6, "mid decode": 20}[moment]
    ids = prompt(rng, 600)
    llm.llm_engine.add_request("x", {"prompt_token_ids": ids}, greedy(60))
    other = prompt(rng, 50)
    llm.llm_engine.add_request("y", {"prompt_token_ids": other}, greedy(30))
    for _ in range(wanted):
        llm.llm_engine.step()
    computed = {r.num_prompt_tokens: r.num_computed_tokens for r in scheduler.running}.get(600)
    assert {
        "waiting": computed is None,
        "mid prefill": computed in range(1, 600),
        "just compressed": computed == 600,
        "mid decode": computed is not None and computed > 605,
    }[moment], f"{computed} tokens are computed"
    llm.llm_engine.abort_request(["x"])
    done = [output for finished in steps(llm) for output in finished]
    (answer,) = [a for a in answers(done) if a.finish_reason != "abort"]
    assert answer.prompt == other and len(answer.tokens) == 30
    dense.check(answer, [])
    llm.generate([{"prompt_token_ids": [5, 6, 7]}], greedy(1), use_tqdm=False)
    assert not compressor_of(llm).tables.requests()
    assert_all_free(llm, initial)


@pytest.mark.parametrize("preset", ["kv-compress", "kv-compress-continual"])
def test_a_cache_too_small_for_its_requests_loses_nothing(preset):
    """The real engine in a storm: arrivals, aborts, preemptions, hits, all kinds of settings."""
    llm = engine({"preset": preset, "rate": 4}, blocks=30, step_tokens=90, max_requests=12)
    scheduler, compressor, initial = scheduler_of(llm), compressor_of(llm), free_blocks(llm)
    rng, watch, live, said = Random(9), dense.Watch(llm), set(), {}
    aborted, prompts, count = set(), [], 0
    with counted(scheduler, "_preempt_request") as preempted:
        while count < 45 or llm.llm_engine.has_unfinished_requests():
            if count < 45 and rng.random() < 0.8:
                ids = prompt(rng, rng.choice([10, 32, 64, 100, 250, 400, 520]))
                if prompts and rng.random() < 0.3:
                    ids = rng.choice(prompts)[: rng.randint(1, 500)] + ids[:20]
                prompts.append(ids)
                knobs = rng.choice(
                    [
                        {},
                        {},
                        {"kv_compress": "off"},
                        {"kv_compress_rate": 2},
                        {"kv_compress_budget": 100},
                        {"kv_compress": "snapkv"},
                    ]
                )
                asked = greedy(rng.choice([1, 5, 60, 150]), knobs)
                llm.llm_engine.add_request(f"s{count}", {"prompt_token_ids": ids}, asked)
                live.add(f"s{count}")
                count += 1
            if live and rng.random() < 0.01:
                gone = rng.choice(sorted(live))
                llm.llm_engine.abort_request([gone])
                live.discard(gone)
                aborted.add(gone)
            for output in llm.llm_engine.step():
                if output.finished:
                    name = output.request_id.split("-")[0]
                    live.discard(name)
                    said[name] = answers([output])[0]
            watch()
            if rng.random() < 0.003:
                scheduler.reset_prefix_cache(reset_running_requests=True)
            scheduler.check_integrity()
            compressor.check_integrity()
    assert len(preempted) >= 5, f"only {len(preempted)} preemptions"
    assert len(said.keys() - aborted) + len(aborted) == count
    checked = 0
    for name in sorted(said.keys() - aborted)[:10]:
        arenas = watch.of(name)
        dense.check(said[name], arenas)
        checked += bool(arenas)
    assert checked > 3
    assert_all_free(llm, initial)
