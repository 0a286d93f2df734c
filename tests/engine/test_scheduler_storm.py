"""Blocks, pages and plans add up in any weather: thousands of steps of the real scheduler.

`weather.py` says what is checked after every step. Shown here: the storms were storms.
"""

import pytest
from engine.weather import Climate, Storm, make_scheduler
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from vllm_kvcompress import accounting

pytestmark = pytest.mark.slow
CONTINUAL = {"preset": "kv-compress-continual", "rate": 8, "continual_slack_blocks": 1}
PROTECTING = {"preset": "kv-compress", "rate": 3, "sink_tokens": 20, "recent_tokens": 30}
FEW_WINDOWS = {"window_max_inflight_tokens": 64}  # four at once

CLIMATES = {
    "synchronous": Climate(1),
    "asynchronous": Climate(2, asynchronous=True),
    "chunks smaller than the window": Climate(3, batch_tokens=11, prefix_caching=False),
    "continual": Climate(4, kv_compress=CONTINUAL, arrival=0.5),
    "continual, asynchronous, few windows": Climate(
        5, kv_compress=CONTINUAL | FEW_WINDOWS, asynchronous=True, arrival=0.5
    ),
    "asynchronous, room for one": Climate(
        0,
        asynchronous=True,
        num_blocks=20,
        batch_tokens=2000,
        max_requests=2,
        reset=0.03,
        kv_compress={"rate": 2},
        arrival=0.5,
        shared_prefix=0.0,
    ),
    "every prompt through an arena, few windows": Climate(
        6, kv_compress={"rate": 1, "test_force_arena": True, **FEW_WINDOWS}
    ),
    "a store, asynchronous": Climate(
        8,
        steps=1200,
        store=True,
        asynchronous=True,
        prefix_caching=False,
        num_blocks=52,
        arrival=0.08,
        shared_prefix=0.9,
    ),
    "prompts propagated": Climate(
        9,
        steps=800,
        asynchronous=True,
        kv_compress={"preset": "fastkv", "rate": 4},
        knobs=False,
        tsp_tokens=600,
        num_blocks=40,
        batch_tokens=100,
        prefix_caching=False,
        arrival=0.5,
        abort=0.02,
    ),
    "by priority": Climate(7, priority=True, kv_compress=PROTECTING, num_blocks=40),
}


@pytest.mark.parametrize("name", CLIMATES)
def test_blocks_pages_and_plans_add_up_in_a_storm(name):
    climate = CLIMATES[name]
    tally = Storm(climate).run()
    print(tally)
    assert tally.steps == climate.steps
    assert tally.compressions > 20 and tally.aborted > 5 and tally.preemptions > 5, tally
    assert tally.mixed_steps > 100, tally
    assert tally.hit_tokens > 500 or not climate.prefix_caching or not climate.shared_prefix, tally
    assert tally.recompressions > 30 or "continual" not in name, tally
    assert tally.small_chunks > 100 or climate.batch_tokens > 11, tally
    assert bool(tally.full_windows) == ("few windows" in name), tally
    assert not climate.store or (tally.loads > 30 and tally.failed_loads > 10), tally
    assert bool(climate.tsp_tokens) == (tally.propagated > 30), tally
    assert bool(tally.deferred_frees) == (climate.store and climate.asynchronous), tally


@st.composite
def climates(draw):
    block_tokens = draw(st.sampled_from([16, 32]))
    continual = draw(st.booleans())
    kv_compress = {
        "preset": "kv-compress-continual" if continual else "kv-compress",
        "rate": draw(st.sampled_from([1.0, 1.5, 2.0, 4.0, 8.0, 64.0])),
        "window_tokens": draw(st.sampled_from([1, 16, 70])),
        "sink_tokens": draw(st.sampled_from([0, 4, 33])),
        "recent_tokens": draw(st.sampled_from([0, 8, 64])),
        "continual_slack_blocks": draw(st.integers(1, 5)),
        "test_force_arena": draw(st.booleans()),
    }
    return Climate(
        seed=draw(st.integers(0, 2**32)),
        block_tokens=block_tokens,
        num_blocks=draw(st.integers(8, 60)),
        batch_tokens=draw(st.sampled_from([9, 16, 33, 100, 2000])),
        max_requests=draw(st.sampled_from([2, 5, 9])),
        prefix_caching=draw(st.booleans()),
        asynchronous=draw(st.booleans()),
        priority=draw(st.booleans()),
        store=draw(st.booleans()),
        kv_compress=kv_compress,
        arrival=draw(st.sampled_from([0.1, 0.5])),
        abort=draw(st.sampled_from([0.0, 0.02, 0.1])),
    )


NO_ROOM_AFTER_FREEING = Climate(
    364,
    block_tokens=32,
    num_blocks=21,
    batch_tokens=2000,
    max_requests=2,
    asynchronous=True,
    kv_compress={
        "preset": "kv-compress-continual",
        "rate": 2,
        "window_tokens": 70,
        "sink_tokens": 0,
        "recent_tokens": 0,
        "continual_slack_blocks": 1,
    },
    arrival=0.1,
    abort=0,
    store=True,
)


@given(climates())
@example(NO_ROOM_AFTER_FREEING)
@settings(max_examples=4, phases=[Phase.explicit, Phase.generate])
def test_blocks_pages_and_plans_add_up_in_any_weather(climate):
    tally = Storm(climate).run()
    assert tally.steps >= 2000 and tally.requests > 50, tally


def test_a_prompt_that_was_loaded_asks_only_for_what_it_does_not_hold():
    """It holds its blocks while it waits to be admitted; twice, it might not fit for ever."""
    scheduler = make_scheduler(Climate(0, num_blocks=40, kv_compress={"rate": 4}))
    manager, tokens = scheduler.per_head, 400
    plan = accounting.plan(tokens, 16, 40, scheduler.kv_compress.settings_or_off(None))
    manager.set_plan("r", plan, 16)
    manager.req_to_blocks["r"] = manager.block_pool.get_new_blocks(20)
    asked = manager.get_num_blocks_to_allocate(
        "r", tokens, [], 320, 320, tokens, apply_admission_cap=True
    )
    assert asked == 25 + plan.arena_blocks - 20 <= manager.block_pool.get_num_free_blocks()
