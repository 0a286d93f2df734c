"""Where nothing is dropped, every token is the one that plain vLLM says."""

from random import Random

import pytest
from engine.engines import (
    answers,
    ask,
    assert_all_free,
    assert_same_words,
    compressor_of,
    counted,
    engine,
    free_blocks,
    greedy,
    prompt,
    scheduler_of,
)

pytestmark = pytest.mark.engine
SAID = 40
FORCED = {"rate": 1, "test_force_arena": True}
LENGTHS = [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 127, 129, 300, 320, 511, 640, 1000, 1500]


@pytest.fixture(scope="module")
def prompts():
    rng = Random(1)
    lengths = LENGTHS + [rng.choice([rng.randint(1, 200), rng.randint(1, 900)]) for _ in range(44)]
    rng.shuffle(lengths)
    return [prompt(rng, n) for n in lengths]


@pytest.fixture(scope="module")
def plain(prompts):
    return ask(engine(), prompts, greedy(SAID))


@pytest.mark.parametrize("step_tokens", [1024, 150])
def test_every_prompt_through_an_arena_says_the_same(prompts, plain, step_tokens):
    llm = engine(FORCED, step_tokens=step_tokens)
    initial = free_blocks(llm)
    with counted(compressor_of(llm), "_compress") as compressions:
        assert assert_same_words(ask(llm, prompts, greedy(SAID)), plain) <= 2
    assert len(compressions) == sum(len(p) >= 32 for p in prompts), "not all went through one"
    assert_all_free(llm, initial)


def test_chunks_smaller_than_the_window_say_the_same(prompts, plain):
    llm = engine(FORCED, step_tokens=11)
    chosen = [i for i, p in enumerate(prompts) if len(p) <= 200]
    with counted(compressor_of(llm), "_compress") as compressions:
        got = ask(llm, [prompts[i] for i in chosen], greedy(SAID))
    assert assert_same_words(got, [plain[i] for i in chosen]) <= 1
    assert len(compressions) == sum(len(prompts[i]) >= 32 for i in chosen)


def test_preempted_requests_say_the_same(prompts, plain):
    llm = engine(FORCED, blocks=100, step_tokens=512)
    initial = free_blocks(llm)
    with (
        counted(scheduler_of(llm), "_preempt_request") as preempted,
        counted(compressor_of(llm), "_compress") as compressions,
    ):
        assert assert_same_words(ask(llm, prompts, greedy(SAID)), plain) <= 2
    assert len(preempted) >= 5, f"only {len(preempted)} preemptions: the cache is too large"
    assert len(compressions) > 30
    assert_all_free(llm, initial)


@pytest.mark.parametrize(
    ("settings", "knobs"),
    [
        ({"rate": 8}, {"kv_compress": "off"}),
        ({"preset": "off"}, None),
        ({"rate": 1}, None),
        ({"rate": 8}, {"kv_compress_rate": 1}),
        ({"rate": 8}, {"kv_compress_budget": 4096}),
        ({"preset": "snapkv"}, {"kv_compress_rate": 1}),
    ],
    ids=["off by request", "off by default", "rate 1", "rate 1 by request", "budget", "snapkv 1"],
)
def test_what_is_not_compressed_says_the_same(prompts, plain, settings, knobs):
    llm = engine(settings)
    with counted(compressor_of(llm), "_compress") as compressions:
        assert assert_same_words(ask(llm, prompts[::3], greedy(SAID, knobs)), plain[::3]) <= 1
    assert not compressions


def test_requests_beside_compressed_ones_say_the_same(prompts, plain):
    """Compressed, untouched and prefilling requests in the same steps, arriving over time."""
    llm = engine({"rate": 8}, step_tokens=150)
    llm.reset_prefix_cache()
    initial = free_blocks(llm)
    knobs = [{"kv_compress": "off"}, {"kv_compress_rate": 16}, {"kv_compress_rate": 1}, None]
    names = [f"{i}" for i in range(len(prompts))]
    waiting, done, mixed = list(range(len(prompts))), {}, 0
    scheduler, compressor = scheduler_of(llm), compressor_of(llm)
    while waiting or llm.llm_engine.has_unfinished_requests():
        for i in waiting[:2]:
            params = greedy(SAID, knobs[i % 4])
            llm.llm_engine.add_request(names[i], {"prompt_token_ids": prompts[i]}, params)
        waiting = waiting[2:]
        for output in llm.llm_engine.step():
            if output.finished:
                done[output.request_id.split("-")[0]] = output
        states = {r.num_computed_tokens < r.num_prompt_tokens for r in scheduler.running}
        mixed += len(states) == 2 and 0 < len(compressor.tables) < len(scheduler.running)
    got = answers([done[name] for name in names])
    alone = [i for i in range(len(prompts)) if i % 4 in (0, 2)]
    assert assert_same_words([got[i] for i in alone], [plain[i] for i in alone]) <= 2
    changed = sum(got[i].tokens != plain[i].tokens for i in range(len(prompts)) if i not in alone)
    assert changed > 3, "compression by 8 and 16 changed nothing: was there any?"
    assert mixed > 5, f"only {mixed} steps mixed all three kinds"
    assert_all_free(llm, initial)
