"""The connector in a running engine: what is stored is reused, and no fault is ever an answer."""

import time
from collections.abc import Callable, Iterator
from random import Random
from threading import Event, current_thread
from types import SimpleNamespace

import pytest
from engine.engines import BLOCK, DEMO_MODEL, ask, assert_same_words, greedy, prompt
from engine.engines import counted as counted_calls

from vllm_kvcompress.transport.keys import namespace, store_key
from vllm_kvcompress.transport.stores import Store, StoreError
from vllm_kvcompress.transport.stores.interface import Reason

pytestmark = pytest.mark.engine
CHUNK, OUTPUTS = 128, 6
MANY = 1 << 30
PATIENCE = {"lookup_limit_s": 60, "load_limit_s": 3600}  # with a machine that is busy elsewhere


class Cached:
    """An engine with the connector, and the connector's two sides."""

    def __init__(self, url: str, additional_config: dict | None = None) -> None:
        from vllm import LLM
        from vllm.config import KVTransferConfig
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        settings = {"store": url, "levels": [2, 4], "chunk_tokens": CHUNK, **PATIENCE}
        self.llm = LLM(
            model=DEMO_MODEL,
            dtype="float32",
            enforce_eager=True,
            block_size=BLOCK,
            max_model_len=2048,
            max_num_batched_tokens=512,
            num_gpu_blocks_override=200,
            additional_config=additional_config or {},
            kv_transfer_config=KVTransferConfig(
                kv_connector="CacheGenConnector",
                kv_connector_module_path="vllm_kvcompress.transport.connector",
                kv_role="kv_both",
                kv_load_failure_policy="recompute",
                kv_connector_extra_config=settings,
            ),
        )
        self.scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler
        self.scheduling, self.working = self.scheduler.connector, get_kv_transfer_group()
        self.store: Store = self.working._store

    def ask(self, prompts, knobs=None, tokens=OUTPUTS):
        said = ask(self.llm, prompts, greedy(tokens, knobs))
        self.working.transfers.flush(300)
        return said

    def recomputed(self, prompts, tokens=OUTPUTS):
        """What the engine says by itself."""
        self.forget()
        return self.ask(prompts, {"cachegen_level": 0}, tokens)

    def forget(self) -> None:
        assert self.llm.reset_prefix_cache()

    def use(self, store: Store) -> None:
        self.scheduling._store = self.working.transfers.store = store

    def totals(self) -> dict[str, float]:
        both = self.scheduling.tally.totals, self.working.tally.totals
        return {
            name: both[0].get(name, 0) + both[1].get(name, 0) for name in {**both[0], **both[1]}
        }

    def during(self, work: Callable) -> tuple[object, dict[str, float]]:
        """The result, and what was counted meanwhile."""
        before = self.totals()
        result = work()
        grown = {k: v - before.get(k, 0) for k, v in self.totals().items()}
        return result, {k: v for k, v in grown.items() if v}

    def digests(self, ids: list[int]) -> list[str]:
        """Names of the chunks of the last request's prompt."""
        from vllm_kvcompress.transport.connector import _shaped_by
        from vllm_kvcompress.transport.keys import chunk_digests, root_digest

        class Plain:
            lora_request, mm_features, cache_salt = None, (), None

        root = root_digest(self.scheduling._fingerprint | _shaped_by(Plain))
        return chunk_digests(root, ids, CHUNK)


@pytest.fixture(scope="module")
def cached(tmp_path_factory) -> Iterator[Cached]:
    from vllm.distributed.kv_transfer.kv_transfer_state import ensure_kv_transfer_shutdown

    ensure_kv_transfer_shutdown()
    yield Cached(f"file://{tmp_path_factory.mktemp('kv')}")
    ensure_kv_transfer_shutdown()  # engines of other tests have no connector


@pytest.fixture(autouse=True)
def same_store_after(cached):
    cached.use(cached.store)
    yield
    cached.use(cached.store)
    cached.scheduler.recompute_kv_load_failures = True
    cached.working.transfers.may_recompute = True
    free = cached.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    assert free == 199, "every block is free again"


def stored_prompt(cached: Cached, seed: int, tokens: int = 700) -> list[int]:
    """A prompt whose chunks are in the store, and not in vLLM's own cache."""
    ids = prompt(Random(seed), tokens)
    cached.ask([ids])
    cached.forget()
    return ids


def test_a_prompt_comes_back_from_the_store_with_the_same_answer(cached):
    ids = stored_prompt(cached, 1)
    want = cached.recomputed([ids])
    cached.forget()
    got, counted = cached.during(lambda: cached.ask([ids]))
    assert_same_words(got, want)
    assert got[0].cached_tokens == 5 * CHUNK
    assert counted["hit_tokens"] == 5 * CHUNK
    assert counted["loaded_chunks:4"] == 5
    assert "missed:not_stored" not in counted
    assert not any(name.startswith("stored") for name in counted), "nothing is stored twice"


def test_every_level_is_stored_smaller_than_raw_and_used_when_asked_for(cached):
    ids = prompt(Random(2), 700)
    _, counted = cached.during(lambda: cached.ask([ids]))
    assert counted["stored_chunks:2"] == counted["stored_chunks:4"] == 5
    for level in (2, 4):
        cached.forget()
        _, counted = cached.during(lambda level=level: cached.ask([ids], {"cachegen_level": level}))
        assert counted[f"loaded_chunks:{level}"] == 5
        ratio = counted["loaded_raw_bytes"] / counted["loaded_bytes"]
        assert ratio > (8 if level == 2 else 1.1)


def test_level_zero_neither_looks_nor_loads(cached):
    ids = stored_prompt(cached, 3)
    got, counted = cached.during(lambda: cached.ask([ids], {"cachegen_level": 0}))
    assert got[0].cached_tokens == 0
    assert not any(name.startswith(("hit", "loaded", "missed")) for name in counted)


def test_a_shared_prefix_is_shared_and_vllms_own_hits_come_first(cached):
    ids = stored_prompt(cached, 4)
    other = ids[: 4 * CHUNK] + prompt(Random(40), 200)
    got, counted = cached.during(lambda: cached.ask([other]))
    assert counted["hit_tokens"] == 4 * CHUNK
    assert counted["stored_chunks:2"] == 1, "only the new chunk"
    assert_same_words(got, cached.recomputed([other]))
    # Now vLLM has blocks that end inside a chunk; the rest of that chunk is loaded.
    cached.forget()
    cached.ask([ids[: CHUNK + 2 * BLOCK + 1]], {"cachegen_level": 0})
    got, counted = cached.during(lambda: cached.ask([ids]))
    assert counted["hit_tokens"] == 5 * CHUNK - (CHUNK + 2 * BLOCK)
    assert_same_words(got, cached.recomputed([ids]))


def test_a_batch_with_hits_and_misses_under_preemption_says_the_same(cached):
    rng = Random(5)
    prompts = [prompt(rng, rng.randrange(400, 900)) for _ in range(14)]
    cached.ask(prompts[::2])
    want = cached.recomputed(prompts, 40)
    cached.forget()
    with counted_calls(cached.scheduler, "_preempt_request") as preempted:
        got, counted = cached.during(lambda: cached.ask(prompts, tokens=40))
    assert preempted, "the cache is too small for all at once"
    assert_same_words(got, want)
    assert counted["hit_tokens"] > 1000


def test_another_tenants_chunks_are_never_seen(cached):
    ids = prompt(Random(6), 400)
    inputs = [{"prompt_token_ids": ids, "cache_salt": salt} for salt in ("a", "b", "a")]
    hits = []
    for salted in inputs:
        cached.forget()
        _, counted = cached.during(
            lambda salted=salted: (
                cached.llm.generate([salted], greedy(2), use_tqdm=False),
                cached.working.transfers.flush(300),
            )
        )
        hits.append(counted.get("hit_tokens", 0))
    assert hits == [0, 0, 3 * CHUNK]
    assert namespace("a") != namespace("b")


class Faulty(Store):
    """A store in which something is wrong with what is read."""

    def __init__(self, store: Store, spoil: Callable[[str, bytes], bytes | None]) -> None:
        self._store, self._spoil, self.reads = store, spoil, 0

    def get(self, key, max_bytes):
        data = self._store.get(key, max_bytes)
        self.reads += 1
        return None if data is None else self._spoil(key, data)

    def put(self, key, data):
        self._store.put(key, data)

    def has(self, keys):
        return self._store.has(keys)

    def delete(self, key):
        self._store.delete(key)


def down(key: str, data: bytes) -> bytes:
    raise StoreError(Reason.DOWN, "gone away")


FAULTS = {
    "store_down": down,
    "gone": lambda key, data: None,
    "corrupt": lambda key, data: data[:400] + bytes([data[400] ^ 1]) + data[401:],
    "corrupt, cut short": lambda key, data: data[: len(data) // 2],
    "corrupt, empty": lambda key, data: b"",
    "corrupt, other bytes": lambda key, data: b"\0" * len(data),
    "other_version": lambda key, data: data[:4] + b"\x07\0" + data[6:],
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("good_reads", [0, 2])
def test_any_fault_is_a_counted_miss_and_the_right_answer(cached, fault, good_reads):
    """Before the first chunk, or in the middle: what came before it is used."""
    ids = stored_prompt(cached, 7)
    want = cached.recomputed([ids])
    cached.forget()
    faulty = Faulty(cached.store, lambda key, data: data)
    spoil = FAULTS[fault]
    faulty._spoil = lambda key, data: data if faulty.reads <= good_reads else spoil(key, data)
    cached.use(faulty)
    got, counted = cached.during(lambda: cached.ask([ids]))
    assert_same_words(got, want)
    assert counted[f"missed:{fault.split(',')[0]}"] == 5 - good_reads
    assert counted.get("loaded_chunks:4", 0) == good_reads


def test_a_chunk_of_another_place_is_refused(cached):
    """Right bytes under the wrong name: another prompt's, another model's, another position's."""
    ids = stored_prompt(cached, 8)
    want = cached.recomputed([ids])
    cached.forget()
    first, second = cached.digests(ids)[:2]
    swapped = cached.store.get(store_key("shared", second, 0, 1, 4), MANY)
    assert swapped is not None
    cached.store.put(store_key("shared", first, 0, 1, 4), swapped)
    got, counted = cached.during(lambda: cached.ask([ids]))
    assert_same_words(got, want)
    assert counted["missed:of_something_else"] == 5


def test_a_slow_store_is_given_up_and_the_engine_goes_on(cached):
    ids = stored_prompt(cached, 9)
    want = cached.recomputed([ids])
    cached.forget()
    go_on = Event()
    slow = Faulty(cached.store, lambda key, data: data)
    slow._spoil = lambda key, data: data if slow.reads == 1 else go_on.wait(60) and data
    cached.use(slow)
    settings = cached.working.transfers.settings
    cached.working.transfers.settings = settings.model_copy(update={"load_limit_s": 1.0})
    try:
        got, counted = cached.during(lambda: cached.ask([ids]))
    finally:
        go_on.set()
        cached.working.transfers.settings = settings
    assert_same_words(got, want)
    assert counted["missed:too_slow"] in (4, 5)


def test_a_lookup_that_hangs_costs_no_more_than_its_limit(cached):
    go_on = Event()

    class Hanging(Faulty):
        def has(self, keys):
            go_on.wait(60)
            return super().has(keys)

    ids = stored_prompt(cached, 10)
    cached.use(Hanging(cached.store, lambda key, data: data))
    settings = cached.scheduling.settings
    cached.scheduling.settings = settings.model_copy(update={"lookup_limit_s": 0.2})
    try:
        got, counted = cached.during(lambda: cached.ask([ids]))
    finally:
        go_on.set()
        cached.scheduling.settings = settings
    assert counted["missed:lookup_too_slow"] == 5
    assert got[0].cached_tokens == 0


def test_a_store_that_cannot_take_more_is_counted_and_nothing_else(cached):
    class Full(Faulty):
        def put(self, key, data):
            raise StoreError(Reason.FULL, "no room")

    cached.use(Full(cached.store, lambda key, data: data))
    ids = prompt(Random(11), 700)
    got, counted = cached.during(lambda: cached.ask([ids]))
    assert len(got[0].tokens) == OUTPUTS
    assert counted["not_stored:store_full"] == 5
    assert "stored_bytes" not in counted


def test_a_full_buffer_drops_instead_of_waiting(cached):
    settings = cached.working.transfers.settings
    cached.working.transfers.settings = settings.model_copy(update={"buffer_mb": 0})
    try:
        _, counted = cached.during(lambda: cached.ask([prompt(Random(12), 700)]))
    finally:
        cached.working.transfers.settings = settings
    assert counted["not_stored:buffer_full"] == 5


def test_an_explicit_fail_policy_ends_the_request(cached):
    ids = stored_prompt(cached, 13)
    cached.scheduler.recompute_kv_load_failures = False
    cached.working.transfers.may_recompute = False
    cached.use(Faulty(cached.store, FAULTS["corrupt"]))
    got = cached.ask([ids])
    assert got[0].finish_reason == "error"
    assert got[0].tokens == []


class SlowLine(Faulty):
    """Takes `seconds(bytes moved)` per byte of a clock of its own, which only fetching moves."""

    def __init__(self, store: Store, seconds: Callable[[int], float]) -> None:
        super().__init__(store, lambda key, data: data)
        self._seconds, self.passed, self.moved, self.began = seconds, 0.0, 0, 0.0
        self.keys: list[str] = []

    def get(self, key, max_bytes):
        data = super().get(key, max_bytes)
        self.passed += len(data) * self._seconds(self.moved)
        self.moved += len(data)
        self.keys.append(key)
        return data

    def time(self) -> float:
        fetching = current_thread().name.startswith("cachegen-fetch")
        return self.began + (self.passed if fetching else 0)

    @property
    def levels(self) -> list[int]:
        return [int(key.rpartition("-")[2]) for key in self.keys]

    def ask(self, cached: Cached, ids: list[int], ttft_ms: float):
        """The answer, with this line in front of the store and its clock in the connector."""
        transfers = cached.working.transfers
        load = transfers.load

        def from_now(job):
            self.began = job.arrived
            load(job)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(transfers, "load", from_now)
            clock = SimpleNamespace(time=self.time, monotonic=time.monotonic)
            patch.setattr("vllm_kvcompress.transport.transfers.time", clock)
            cached.use(self)
            return cached.ask([ids], {"cachegen_ttft_ms": ttft_ms})


@pytest.fixture
def no_history(cached):
    """A connector that has measured nothing yet."""
    transfers = cached.working.transfers
    transfers._rates.clear()
    transfers._recompute_s = transfers._decode_s = None
    return transfers


def test_bandwidth_that_falls_takes_a_lower_level_and_the_answer_stands(cached, no_history):
    """Two levels, a target, and a line that slows down after two chunks."""
    ids = stored_prompt(cached, 14, 1700)
    want = cached.recomputed([ids])
    cached.forget()
    no_history.may_recompute = False
    first = store_key("shared", cached.digests(ids)[0], 0, 1, 4)
    size = len(cached.store.get(first, MANY) or b"")
    line = SlowLine(cached.store, lambda moved: (0.02 if moved < 2 * size else 0.4) / size)
    got, counted = cached.during(lambda: line.ask(cached, ids, 1500))
    assert line.levels[:2] == [2, 4], "unknown, then fast"
    assert 2 in line.levels[3:], "and then it is not"
    assert line.passed <= 1.5
    assert counted["hit_tokens"] == 13 * CHUNK
    assert len(got[0].tokens) == len(want[0].tokens)


def test_recomputing_that_is_faster_is_chosen(cached, no_history):
    ids = stored_prompt(cached, 15)
    want = cached.recomputed([ids])
    cached.forget()
    no_history._recompute_s = 0.01
    no_history._rates.append(1e5)
    line = SlowLine(cached.store, lambda moved: 1e-5)
    got, counted = cached.during(lambda: line.ask(cached, ids, 500))
    assert_same_words(got, want)
    assert counted["missed:recompute_is_faster"] == 5
    assert line.levels == []


def test_the_last_chunk_is_used_up_to_the_block_before_the_last_token(cached):
    ids = stored_prompt(cached, 17, 3 * CHUNK)
    want = cached.recomputed([ids])
    cached.forget()
    got, counted = cached.during(lambda: cached.ask([ids]))
    assert counted["hit_tokens"] == 3 * CHUNK - BLOCK
    assert counted["loaded_chunks:4"] == 3
    assert_same_words(got, want)


def test_the_next_turn_of_a_conversation_finds_the_answer_too(cached):
    ids = prompt(Random(18), 3 * CHUNK - 20)
    (said,) = cached.ask([ids], tokens=CHUNK + 40)
    cached.forget()
    turn = [*ids, *said.tokens, *prompt(Random(19), 50)]
    want = cached.recomputed([turn])
    cached.forget()
    got, counted = cached.during(lambda: cached.ask([turn]))
    assert counted["hit_tokens"] == 4 * CHUNK
    assert_same_words(got, want)
