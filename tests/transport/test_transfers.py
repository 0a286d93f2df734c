"""The worker's side alone: a cache of a few blocks, a store of a few lines."""

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from paging.pools import PACKINGS

from vllm_kvcompress.transport import coders
from vllm_kvcompress.transport.beside import Fence
from vllm_kvcompress.transport.coders import DeviceCoder, HostCoder
from vllm_kvcompress.transport.jobs import Compute, Load, Save
from vllm_kvcompress.transport.pages import CachePages
from vllm_kvcompress.transport.settings import ConnectorSettings
from vllm_kvcompress.transport.stats import TIMELINE, CacheGenStats, Tally
from vllm_kvcompress.transport.stores import Store, StoreError
from vllm_kvcompress.transport.stores.interface import Reason
from vllm_kvcompress.transport.timeline import Timelines
from vllm_kvcompress.transport.transfers import Transfers

BLOCK, CHUNK, HEADS, SIZE, LAYERS = 16, 32, 2, 8, 2


class Memory(Store):
    """A dictionary; `before_get` may wait or raise."""

    def __init__(self) -> None:
        self.data: dict[str, bytes] = {}
        self.before_get: Callable[[str], None] = lambda key: None

    def get(self, key, max_bytes):
        self.before_get(key)
        return self.data.get(key)

    def put(self, key, data):
        self.data[key] = data

    def has(self, keys):
        return [key in self.data for key in keys]

    def delete(self, key):
        self.data.pop(key, None)


@pytest.fixture(params=["cpu", "cuda"])
def transfers(request, monkeypatch):
    """With each coder; the CUDA kernels run on this CPU."""
    torch.manual_seed(0)
    layers = [torch.randn(12, HEADS, BLOCK, 2 * SIZE) for _ in range(LAYERS)]
    packing, kind = "transposed", HostCoder
    if request.param == "cuda":
        library = request.getfixturevalue("cuda_on_this_cpu")
        monkeypatch.setattr(coders, "library_for", lambda device: library)
        packing, kind = "linear", DeviceCoder
    pages = CachePages(layers, lambda: PACKINGS[packing](BLOCK, SIZE))
    settings = ConnectorSettings(store="memory", levels=(4,), chunk_tokens=CHUNK, load_limit_s=3600)
    made = Transfers(settings, Memory(), coders.coder(settings, None, pages), Tally())
    assert type(made.coder) is kind
    yield made
    made.close()


def load(**changes) -> Load:
    """Two chunks into blocks 5 to 8, of a prompt of 70 tokens."""
    fields = dict(
        request_id="r",
        space="shared",
        first_chunk=0,
        digests=["a" * 64, "b" * 64],
        levels=[(4,), (4,)],
        first_token=0,
        block_ids=[5, 6, 7, 8],
        prompt_tokens=70,
        arrived=time.time(),
        level=None,
        ttft_s=None,
    )
    return Load(**{**fields, **changes})


@pytest.fixture
def stored(transfers):
    """Blocks 1 to 4 are in the store, as the two chunks of `load`."""
    for digest, blocks in (("a" * 64, [1, 2]), ("b" * 64, [3, 4])):
        transfers.save(Save("shared", digest, blocks))
    transfers.flush(300)
    assert len(transfers.store.data) == 2
    return transfers


def told(transfers: Transfers, before_each: Callable[[], None] = lambda: None):
    """What vLLM hears in the step in which the load ends: (finished, invalid)."""
    while True:
        before_each()
        finished, invalid = transfers.take_finished(), transfers.take_invalid()
        if finished:
            return finished, invalid
        assert not invalid, "told of a failure before its end"
        time.sleep(0.001)


def test_what_was_saved_is_loaded_bit_by_bit(stored) -> None:
    stored.load(load())
    assert told(stored) == ({"r"}, set())
    for layer in stored.pages.layers:
        assert torch.equal(layer[5:9], layer[1:5])


def test_blocks_that_vllm_has_are_left_alone_and_a_part_of_a_chunk_is_used(stored) -> None:
    before = [layer.clone() for layer in stored.pages.layers]
    stored.load(load(first_token=BLOCK, block_ids=[5, 6, 7]))
    assert told(stored) == ({"r"}, set())
    for layer, old in zip(stored.pages.layers, before, strict=True):
        assert torch.equal(layer[6:8], layer[2:4])
        assert torch.equal(layer[[5, 8]], old[[5, 8]])


@pytest.mark.parametrize("good", [0, 1])
def test_a_failed_load_and_its_end_are_told_in_one_step(stored, good) -> None:
    """However the steps fall: a hundred loads, each step as soon as it can be."""
    keys = sorted(stored.store.data)

    def fail(key):
        if key == keys[good]:
            raise StoreError(Reason.DOWN, "gone away")

    stored.store.before_get = fail
    for _ in range(100):
        stored.load(load())
        assert told(stored) == ({"r"}, set([5, 6, 7, 8][2 * good :]))
    assert stored.tally.totals["missed:store_down"] == 100 * (2 - good)


def test_a_step_between_failure_and_end_hears_of_neither_or_both(stored) -> None:
    """The two are published at once: no step can fall between them."""
    stored.store.data.clear()
    lock, seen = stored._lock, []

    class Watched:
        def __enter__(self):
            lock.acquire()

        def __exit__(self, *raised):
            seen.append((set(stored._finished), set(stored._missing)))
            lock.release()

    stored._lock = Watched()
    stored.load(load())
    assert told(stored) == ({"r"}, {5, 6, 7, 8})
    assert all(bool(finished) == bool(missing) for finished, missing in seen)


def test_a_load_that_outlives_its_limit_is_missed_and_writes_nothing_later(stored) -> None:
    """Its blocks may belong to another request by then."""
    go_on = threading.Event()
    stored.store.before_get = lambda key: go_on.wait(30)
    stored.settings = stored.settings.model_copy(update={"load_limit_s": 0.05})
    before = [layer.clone() for layer in stored.pages.layers]
    stored.load(load())
    assert told(stored) == ({"r"}, {5, 6, 7, 8})
    go_on.set()
    stored._fetchers.submit(int).result(30)
    assert all(map(torch.equal, stored.pages.layers, before))
    assert stored.tally.totals["missed:too_slow"] == 2


@pytest.mark.parametrize("wrong", ["corrupt", "of_something_else", "other_version"])
def test_a_spoilt_chunk_leaves_the_store_unless_another_version_reads_it(stored, wrong) -> None:
    first, second = sorted(stored.store.data)
    good = stored.store.data[first]
    spoilt = {
        "corrupt": good[:-1],
        "of_something_else": stored.store.data[second],
        "other_version": good[:4] + b"\x07\0" + good[6:],
    }
    stored.store.data[first] = spoilt[wrong]
    stored.load(load())
    assert told(stored) == ({"r"}, {5, 6, 7, 8})
    assert stored.tally.totals[f"missed:{wrong}"] == 2
    assert stored.store.has([first, second]) == [wrong == "other_version", True]


def test_queues_are_empty_again_after_the_work(stored) -> None:
    stored.load(load())
    told(stored)
    totals = stored.tally.totals
    assert totals["loads_in_flight"] == totals["saves_queued"] == totals["save_queue_bytes"] == 0
    assert totals["loaded_raw_bytes"] / totals["loaded_bytes"] > 1


def test_the_timeline_tells_transfer_decode_compute_and_first_token(stored) -> None:
    stored.load(load(ttft_s=9.0))
    told(stored)
    now = time.time()
    steps = (
        ([Compute("r", 64, 66, 70), Compute("other", 0, 9, 9)], 0, 0.25),
        ([Compute("r", 66, 70, 70)], 0.25, 0.5),
        ([Compute("r", 0, 70, 70)], 9, 10),  # preempted: not again
    )
    for prompts, began, ended in steps:
        stored.computed(prompts, Fence(now + began), Fence(now + ended))
    timelines = Timelines()
    timelines.add(stored.tally.take().data[TIMELINE])
    (one,) = timelines.to_list()
    assert one["target_ms"] == pytest.approx(9000)
    for event in ("fetch", "decode"):
        seen = [(m["tokens"], m["level"]) for m in one["marks"] if m["event"] == event]
        assert seen == [([0, 32], 4), ([32, 64], 4)]
    computed = [m for m in one["marks"] if m["event"] == "compute"]
    assert [m["tokens"] for m in computed] == [[64, 66], [66, 70]]
    assert one["first_token_ms"] == computed[-1]["ms"][1]


def test_figures_of_two_workers_add_up_and_logs_leave_timelines_out() -> None:
    both = CacheGenStats({"hit_tokens": 1, TIMELINE: [["a"]]})
    both.aggregate(CacheGenStats({"hit_tokens": 2, TIMELINE: [["b"]], "missed:gone": 1}))
    assert both.data[TIMELINE] == [["a"], ["b"]]
    assert both.reduce() == {"hit_tokens": 3, "missed:gone": 1}


def test_ranks_after_the_first_tell_no_timeline(transfers) -> None:
    transfers.rank = 1
    transfers.load(load())
    told(transfers)
    assert TIMELINE not in transfers.tally.take().data


def test_nan_and_infinities_survive(transfers) -> None:
    transfers.pages.layers[0][1, 0, 0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    transfers.save(Save("shared", "a" * 64, [1, 2]))
    transfers.flush(300)
    transfers.load(load(digests=["a" * 64], levels=[(4,)], block_ids=[5, 6]))
    assert told(transfers) == ({"r"}, set())
    np.testing.assert_array_equal(transfers.pages.layers[0][5], transfers.pages.layers[0][1])
