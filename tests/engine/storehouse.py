"""The connector's worker side in a storm: real transfers, when and whether they end is chance."""

import random
from concurrent.futures import Future

from torch import Tensor
from vllm.v1.outputs import KVConnectorOutput

from vllm_kvcompress.paging.pool import PageFormat
from vllm_kvcompress.transport.coders import coder
from vllm_kvcompress.transport.jobs import Jobs
from vllm_kvcompress.transport.pages import CachePages
from vllm_kvcompress.transport.stats import Tally
from vllm_kvcompress.transport.stores import Store, StoreError
from vllm_kvcompress.transport.stores.interface import Reason
from vllm_kvcompress.transport.transfers import Transfers


class Now:
    """An executor that works when it is asked, so that a storm can be had again."""

    def submit(self, work, *arguments) -> Future:
        done = Future()
        done.set_result(work(*arguments))
        return done


class Sometime:
    """An executor that works when `some` says so."""

    def __init__(self) -> None:
        self.waiting = []

    def submit(self, work, *arguments) -> None:
        self.waiting.append((work, arguments))

    def some(self, rng: random.Random) -> None:
        rng.shuffle(self.waiting)
        while self.waiting and rng.random() < 0.4:
            work, arguments = self.waiting.pop()
            work(*arguments)


class Shaky(Store):
    """Forgets, and is down now and then."""

    def __init__(self, rng: random.Random) -> None:
        self._rng, self._data = rng, {}

    def get(self, key, max_bytes):
        if self._rng.random() < 0.1:
            raise StoreError(Reason.DOWN, "gone away")
        return self._data.get(key)

    def put(self, key, data):
        self._data[key] = data
        while len(self._data) > 300:
            del self._data[next(iter(self._data))]

    def has(self, keys):
        return [key in self._data for key in keys]

    def delete(self, key):
        self._data.pop(key, None)


class Storehouse:
    def __init__(self, rng: random.Random, connector, views: list[Tensor], packing: PageFormat):
        self._rng, store = rng, Shaky(rng)
        connector._store, connector._lookups = store, Now()
        settings = connector.settings
        pages = CachePages(views, lambda: packing)
        self.transfers = Transfers(settings, store, coder(settings, None, pages), Tally())
        self._loads = self.transfers._loaders = Sometime()
        for others in ("_fetchers", "_landers", "_savers"):
            setattr(self.transfers, others, Now())

    def step(self, jobs: Jobs) -> KVConnectorOutput:
        """What vLLM hears after a step, in the order in which a model runner asks."""
        for load in jobs.loads:
            self.transfers.load(load)
        for save in jobs.saves:
            self.transfers.save(save)
        self._loads.some(self._rng)
        finished = self.transfers.take_finished()
        return KVConnectorOutput(
            finished_recving=finished, invalid_block_ids=self.transfers.take_invalid()
        )
