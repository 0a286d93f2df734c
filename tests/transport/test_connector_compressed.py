"""The connector together with per-head compression."""

from collections.abc import Iterator
from dataclasses import replace
from random import Random

import pytest
from engine.engines import ask, assert_same_words, compressor_of, greedy, prompt
from transport.test_connector import CHUNK, FAULTS, OUTPUTS, Cached, Faulty

from vllm_kvcompress.engine.scheduler import _take_worker_stats
from vllm_kvcompress.engine.stats import WorkerStats
from vllm_kvcompress.transport.stats import CacheGenStats

pytestmark = pytest.mark.engine
SETTINGS = {"preset": "snapkv", "rate": 4, "window_tokens": 32}


@pytest.fixture(scope="module")
def compressed(tmp_path_factory) -> Iterator[Cached]:
    from vllm.distributed.kv_transfer.kv_transfer_state import ensure_kv_transfer_shutdown

    ensure_kv_transfer_shutdown()
    url = f"file://{tmp_path_factory.mktemp('kv')}"
    yield Cached(url, additional_config={"kv_compress": SETTINGS})
    ensure_kv_transfer_shutdown()


@pytest.mark.parametrize("tokens", [300, 5 * CHUNK + 10, 900])
def test_a_loaded_prompt_is_compressed_to_the_same_pages(compressed, tokens):
    """What comes from the store is whole; it is compressed here, as if it had been computed."""
    ids = prompt(Random(tokens), tokens)
    want = compressed.ask([ids], tokens=12)
    done = compressed.scheduler.totals.requests["snapkv", "compressed"]
    compressed.forget()
    got, counted = compressed.during(lambda: compressed.ask([ids], tokens=12))
    assert_same_words(got, want)
    loaded = min(tokens // CHUNK * CHUNK, (tokens - 32) // 32 * 32)
    assert counted["hit_tokens"] == loaded, "the window is computed here"
    assert compressed.scheduler.totals.requests["snapkv", "compressed"] == done + 1
    compressed.scheduler.check_integrity()
    compressor_of(compressed.llm).check_integrity()


def test_a_compressing_batch_with_hits_and_misses_says_what_it_says_alone(compressed):
    rng = Random(1)
    prompts = [prompt(rng, rng.randrange(200, 1000)) for _ in range(10)]
    want = [compressed.ask([ids], tokens=20)[0] for ids in prompts]
    compressed.forget()
    got, counted = compressed.during(lambda: compressed.ask(prompts, tokens=20))
    assert_same_words(got, want)
    assert counted["hit_tokens"] > 2000
    free = compressed.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    compressed.scheduler.check_integrity()
    assert free == 199


def test_a_broken_chunk_of_a_compressing_request_is_recomputed(compressed):
    ids = prompt(Random(2), 700)
    want = compressed.ask([ids], tokens=12)
    compressed.forget()
    store = compressed.store
    faulty = Faulty(store, lambda key, data: data)
    faulty._spoil = lambda key, data: data if faulty.reads <= 2 else FAULTS["corrupt"](key, data)
    compressed.use(faulty)
    got, counted = compressed.during(lambda: compressed.ask([ids], tokens=12))
    compressed.use(store)
    assert_same_words(got, want)
    assert counted["loaded_chunks:4"] == 2
    assert counted["missed:corrupt"] == 3
    compressed.scheduler.check_integrity()


@pytest.mark.parametrize(
    ("knobs", "saved"),
    [
        ({"kv_compress_question": 300}, 400 // CHUNK),
        ({"kv_compress": "fastkv"}, 0),
        ({"kv_compress": "off"}, 700 // CHUNK),
    ],
    ids=["question unseen", "propagated", "off"],
)
def test_nothing_that_saw_a_compressed_context_is_stored(compressed, knobs, saved):
    ids = prompt(Random(str(knobs)), 700)
    compressed.ask([ids], knobs, tokens=4)
    compressed.forget()
    _, counted = compressed.during(lambda: compressed.ask([ids], {"kv_compress": "off"}))
    assert counted.get("hit_tokens", 0) == saved * CHUNK
    compressed.scheduler.check_integrity()


def test_propagated_prompts_neither_load_nor_save_beside_others_that_do(compressed):
    """Deep layers of such a prompt hold selected tokens only: no store has or wants them."""
    rng = Random(7)
    prompts = [prompt(rng, n) for n in (700, 600, 500, 400)]
    knobs = [{"kv_compress": name} for name in ("tsp", "off", "fastkv", "snapkv")]
    want = [compressed.ask([ids], own)[0] for ids, own in zip(prompts, knobs, strict=True)]
    for ids in prompts:
        compressed.ask([ids], {"kv_compress": "off"}, tokens=1)  # now all of them are stored
    compressed.forget()
    params = [greedy(OUTPUTS, own) for own in knobs]
    got, counted = compressed.during(lambda: ask(compressed.llm, prompts, params))
    assert_same_words(got, want)
    off, before_the_window = 600 // CHUNK * CHUNK, (400 - 32) // 32 * 32
    assert counted["hit_tokens"] == off + before_the_window
    compressed.scheduler.check_integrity()
    compressor_of(compressed.llm).check_integrity()


def test_figures_of_both_arrive_apart():
    """Seconds per compression and the connector's counters share one way to the scheduler."""
    both = replace(WorkerStats.of([0.1], {}), connector=CacheGenStats({"stored_bytes": 1}))
    both.aggregate(CacheGenStats({"stored_bytes": 2}))
    theirs = CacheGenStats({"stored_bytes": 4})
    both.aggregate(replace(WorkerStats.of([0.2], {"attention": ["cuda"]}), connector=theirs))
    arguments, ours = _take_worker_stats(("first", both))
    assert ours is not None
    assert ours.data == {"seconds": [0.1, 0.2], "kernels": {"attention": ["cuda"]}}
    assert arguments == ("first", CacheGenStats({"stored_bytes": 7}))
