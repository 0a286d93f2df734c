"""The worker's side: threads that fetch and decode, encode and store, off the critical path."""

import math
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import torch

from vllm_kvcompress.transport.beside import Fence
from vllm_kvcompress.transport.chunks import WrongProfile
from vllm_kvcompress.transport.codec import CorruptChunk
from vllm_kvcompress.transport.coders import Coder
from vllm_kvcompress.transport.container import WrongVersion, parse
from vllm_kvcompress.transport.jobs import Compute, Load, Save
from vllm_kvcompress.transport.keys import store_key
from vllm_kvcompress.transport.levels import RECOMPUTE
from vllm_kvcompress.transport.settings import ConnectorSettings
from vllm_kvcompress.transport.stats import Tally
from vllm_kvcompress.transport.stores import Store, StoreError
from vllm_kvcompress.transport.stream import RULES, FixedLevel, Progress, StreamPolicy
from vllm_kvcompress.transport.timeline import Event, Mark

LOADS_AT_ONCE = 4
RATES_KEPT = 32
LEARN_FROM_TOKENS = 64  # a step with fewer prompt tokens says little about recomputing
USUAL_RATIO = {1: 10, 2: 8, 3: 6, 4: 1.5}  # of raw bytes, before the first chunk of a level
MB = 1 << 20


class Miss(Exception):
    """A chunk that has to be recomputed; the message is the reason it is counted under."""


class Arrived(NamedTuple):
    """A chunk's bytes, as they came under its key."""

    chunk: int
    key: str
    data: bytes


class Transfers:
    """Loads and saves of one worker (`rank` of `ranks`).

    `may_recompute`: vLLM recomputes what is reported missing, so the text is a level like others.
    """

    def __init__(
        self,
        settings: ConnectorSettings,
        store: Store,
        coder: Coder,
        tally: Tally,
        *,
        rank: int = 0,
        ranks: int = 1,
        may_recompute: bool = True,
    ) -> None:
        self.settings, self.store, self.coder, self.pages = settings, store, coder, coder.pages
        self.tally, self.rank, self.ranks = tally, rank, ranks
        self.may_recompute = may_recompute
        self._loaders = ThreadPoolExecutor(LOADS_AT_ONCE, "cachegen-load")
        self._fetchers = ThreadPoolExecutor(LOADS_AT_ONCE, "cachegen-fetch")
        self._landers = ThreadPoolExecutor(1, "cachegen-land")
        self._savers = ThreadPoolExecutor(1, "cachegen-save")
        self._lock = threading.Lock()
        self._finished: set[str] = set()
        self._missing: set[int] = set()  # of the loads in `_finished`
        self._invalid: set[int] = set()  # of loads told to be finished
        self._buffered = 0
        self._saving: set[Future[None]] = set()
        self._seen_bytes: dict[int, float] = {}  # of a chunk, by level
        self._rates: deque[float] = deque(maxlen=RATES_KEPT)  # bytes per second of transfers
        self._recompute_s: float | None = None  # per chunk, as the next one
        self._decode_s: float | None = None
        self._finish_s: float | None = None  # from the end of a load to the first token
        self._on_the_way: dict[str, float] = {}  # without a first token yet: when the load ended

    def load(self, job: Load) -> None:
        """Begin to bring chunks in; `take_finished` tells when it is done."""
        deadline = job.arrived + (job.ttft_s or 0)
        self._mark(Event.REQUEST, job.request_id, 0, job.prompt_tokens, 0, job.arrived, deadline)
        self._on_the_way[job.request_id] = math.inf
        self.tally.add("loads_in_flight")
        self._loaders.submit(self._load, job, self.coder.beside.fence())

    def take_finished(self) -> set[str]:
        """Requests whose loads are done since the last call, whole or not."""
        with self._lock:
            done, self._finished = self._finished, set()
            self._invalid |= self._missing
            self._missing = set()
        return done

    def take_invalid(self) -> set[int]:
        """Blocks that were to be loaded and were not, of loads that `take_finished` told of.

        Both reach vLLM in one step: told of a failed load before its end, it would end the
        request and hold its blocks until some later step.
        """
        invalid, self._invalid = self._invalid, set()
        return invalid

    def save(self, job: Save) -> None:
        """Copy the chunk out of the cache now; encode and store it later. A full buffer drops."""
        size = len(job.block_ids) * self.pages.block_bytes
        with self._lock:
            if self._buffered + size > self.settings.buffer_mb * MB:
                self.tally.add("not_stored", label="buffer_full")
                return
        try:
            taken = self.coder.take(job.block_ids)
        except torch.OutOfMemoryError:
            self.tally.add("not_stored", label="out_of_memory")
            return
        with self._lock:
            self._buffered += size
        self.tally.add("saves_queued")
        self.tally.add("save_queue_bytes", size)
        landed = self._landers.submit(self.coder.land, taken)
        future = self._savers.submit(self._save, job, landed, size)
        self._saving.add(future)
        future.add_done_callback(self._saving.discard)

    def flush(self, limit_s: float) -> None:
        """Wait until what was to be saved is, at most so long."""
        end = time.monotonic() + limit_s
        for future in list(self._saving):
            try:
                future.result(max(0.0, end - time.monotonic()))
            except TimeoutError:
                return

    def computed(self, prompts: Sequence[Compute], began: Fence, ended: Fence) -> None:
        """Learn how fast prompts are computed, once the step that does is over."""
        self.coder.beside.time(began, ended, partial(self._computed, prompts))

    def _computed(self, prompts: Sequence[Compute], began: float, ended: float) -> None:
        tokens = sum(part.last - part.first for part in prompts)
        if tokens >= LEARN_FROM_TOKENS:
            per_chunk = (ended - began) / tokens * self.settings.chunk_tokens
            self._recompute_s = _smoothed(self._recompute_s, per_chunk)
        for part in prompts:
            last = part.last == part.prompt_tokens
            with self._lock:
                loaded = self._on_the_way.get(part.request_id)
                if loaded is not None and last:
                    del self._on_the_way[part.request_id]
            if loaded is None:
                continue
            where = part.request_id, part.first, part.last, 0
            self._mark(Event.COMPUTE, *where, began, ended)
            if last:
                self._mark(Event.FIRST_TOKEN, *where, ended, ended)
                if tokens < LEARN_FROM_TOKENS:
                    self._finish_s = _smoothed(self._finish_s, ended - loaded)

    def forget(self, request_ids: set[str]) -> None:
        """These requests have ended."""
        with self._lock:
            for request_id in request_ids:
                self._on_the_way.pop(request_id, None)

    def close(self) -> None:
        for pool in (self._landers, self._savers, self._loaders, self._fetchers):
            pool.shutdown(wait=False, cancel_futures=True)
        self.store.close()

    def _load(self, job: Load, ours: Fence) -> None:
        good_until = job.first_token
        try:
            for arrived in self._stream(job):
                begun, first = time.time(), good_until
                level = self._place(job, arrived, ours)
                ended, good_until = time.time(), (arrived.chunk + 1) * self.settings.chunk_tokens
                self._decode_s = _smoothed(self._decode_s, ended - begun)
                self._mark(Event.DECODE, job.request_id, first, good_until, level, begun, ended)
                self.tally.add("decode_seconds", ended - begun)
        except Miss as miss:
            self._count_rest(job, good_until, str(miss))
        except Exception as error:
            self._count_rest(job, good_until, type(error).__name__)
        block = self.pages.block_tokens
        self.tally.add("loads_in_flight", -1)
        with self._lock:
            self._missing.update(job.block_ids[max(good_until, job.first_token) // block :])
            self._finished.add(job.request_id)
            if job.request_id in self._on_the_way:
                self._on_the_way[job.request_id] = time.time()

    def _stream(self, job: Load) -> Iterator[Arrived]:
        """Chunks in order; the next one is fetched while one is decoded."""
        arrived: SimpleQueue[Arrived | Exception | None] = SimpleQueue()
        given_up = threading.Event()

        def fetch_all() -> None:
            try:
                policy = self._policy(job)
                for i in range(len(job.digests)):
                    if given_up.is_set():
                        return
                    waiting = arrived.qsize() + (i > 0)
                    arrived.put(self._fetch(job, i, policy, undecoded=waiting))
                arrived.put(None)
            except Exception as error:
                arrived.put(error)

        self._fetchers.submit(fetch_all)
        end = time.monotonic() + self.settings.load_limit_s
        try:
            while True:
                item = _get_before(arrived, end)
                if item is None:
                    return
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            given_up.set()

    def _policy(self, job: Load) -> StreamPolicy:
        if job.level is not None:
            return FixedLevel(job.level)
        if job.ttft_s is not None:
            return RULES[self.settings.rule](job.ttft_s)
        return FixedLevel(max(self.settings.levels))

    def _fetch(self, job: Load, i: int, policy: StreamPolicy, undecoded: int) -> Arrived:
        chunk_tokens, per_chunk_s = self.settings.chunk_tokens, self._recompute_s
        rest = job.prompt_tokens - len(job.block_ids) * self.pages.block_tokens
        rates = list(self._rates)
        progress = Progress(
            remaining=[self._sizes(levels) for levels in job.levels[i:]],
            total_chunks=len(job.levels),
            elapsed_s=time.time() - job.arrived,
            bytes_per_s=rates[-1] if rates else None,
            recompute_s=per_chunk_s if self.may_recompute else None,
            worst_bytes_per_s=min(rates, default=None),
            decode_s=self._decode_s or 0,
            undecoded=undecoded,
            finish_s=max(self._finish_s or 0, (per_chunk_s or 0) * rest / chunk_tokens),
        )
        level = policy.choose(progress)
        if level == RECOMPUTE:
            raise Miss("recompute_is_faster")
        key = store_key(job.space, job.digests[i], self.rank, self.ranks, level)
        begun = time.time()
        try:
            data = self.store.get(key, self._chunk_bytes() + MB)
        except StoreError as error:
            raise Miss(f"store_{error.reason}") from error
        ended = time.time()
        first = (job.first_chunk + i) * chunk_tokens
        self._mark(Event.FETCH, job.request_id, first, first + chunk_tokens, level, begun, ended)
        self.tally.add("fetch_seconds", ended - begun)
        if data is None:
            raise Miss("gone")
        self._rates.append(len(data) / max(ended - begun, 1e-6))
        self._seen_bytes[level] = len(data)
        self.tally.add("loaded_bytes", len(data))
        return Arrived(job.first_chunk + i, key, data)

    def _place(self, job: Load, arrived: Arrived, ours: Fence) -> int:
        """Decode one chunk into its blocks, those left out that vLLM has already. Its level."""
        chunk, key, data = arrived
        try:
            container = parse(data, self._chunk_bytes())
            header = container.header
            shape = len(self.pages.layers), self.pages.heads, self.pages.head_size
            if (header.layers, header.heads, header.head_size) != shape or (
                header.dtype != self.pages.dtype
                or header.tokens != self.settings.chunk_tokens
                or header.key != job.digests[chunk - job.first_chunk]
            ):
                self._discard(key)
                raise Miss("of_something_else")
            block = self.pages.block_tokens
            start = chunk * self.settings.chunk_tokens
            skipped = max(0, job.first_token - start) // block
            ids = job.block_ids[start // block : (start + self.settings.chunk_tokens) // block]
            if wanted := ids[skipped:]:
                tokens = slice(skipped * block, len(ids) * block)
                self.coder.place(container, wanted, tokens, ours)
        except WrongVersion as error:
            raise Miss("other_version") from error
        except WrongProfile as error:
            raise Miss("other_profile") from error
        except CorruptChunk as error:
            self._discard(key)
            raise Miss("corrupt") from error
        self.tally.add("loaded_chunks", label=header.level)
        self.tally.add("loaded_raw_bytes", header.raw_bytes)
        return header.level

    def _discard(self, key: str) -> None:
        """Of no use to anybody: whoever recomputes the chunk next stores it anew."""
        with suppress(StoreError):
            self.store.delete(key)

    def _save(self, job: Save, landed: Future[Any], size: int) -> None:
        try:
            kv = landed.result()
            for level in self.settings.levels:
                begun = time.time()
                data = self.coder.encode(kv, level, job.digest)
                encoded = time.time()
                self.tally.add("encode_seconds", encoded - begun)
                key = store_key(job.space, job.digest, self.rank, self.ranks, level)
                self.store.put(key, data)
                self._seen_bytes[level] = len(data)
                self.tally.add("put_seconds", time.time() - encoded)
                self.tally.add("stored_bytes", len(data))
                self.tally.add("stored_raw_bytes", size)
                self.tally.add("stored_chunks", label=level)
        except StoreError as error:
            self.tally.add("not_stored", label=f"store_{error.reason}")
        except Exception as error:
            self.tally.add("not_stored", label=type(error).__name__)
        finally:
            with self._lock:
                self._buffered -= size
            self.tally.add("saves_queued", -1)
            self.tally.add("save_queue_bytes", -size)

    def _sizes(self, levels: tuple[int, ...]) -> dict[int, int]:
        """Bytes by level, from chunks seen so far, else guessed by the level's usual ratio."""
        raw = self._chunk_bytes()
        return {
            level: int(self._seen_bytes.get(level, raw / USUAL_RATIO[level])) for level in levels
        }

    def _count_rest(self, job: Load, good_until: int, reason: str) -> None:
        tokens = (job.first_chunk + len(job.digests)) * self.settings.chunk_tokens - good_until
        self.tally.add("missed", -(-tokens // self.settings.chunk_tokens), label=reason)

    def _mark(self, *fields: Any) -> None:
        if self.rank == 0:
            self.tally.mark(Mark(*fields))

    def _chunk_bytes(self) -> int:
        return self.pages.block_bytes * self.settings.chunk_tokens // self.pages.block_tokens


def _smoothed(old: float | None, new: float) -> float:
    return new if old is None else 0.5 * (old + new)


def _get_before(
    queue: "SimpleQueue[Arrived | Exception | None]", end: float
) -> Arrived | Exception | None:
    try:
        return queue.get(timeout=max(0.0, end - time.monotonic()))
    except Empty:
        return Miss("too_slow")
