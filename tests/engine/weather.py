"""A storm of requests over the real scheduler and the real compressor, without a model.

The scheduler, its block manager and pool are vLLM's and ours; the worker's compressor works on
a small real page pool. In between stands a model runner of a page of Python: it keeps block ids
as vLLM's does, writes for every computed token a key that says whose it is, and reads back what
attention would read. Whatever is freed, published or copied at the wrong moment shows up as a
key that is not the expected one.
"""

import random
import tempfile
from collections import deque
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from engine.storehouse import Storehouse
from paging.pools import PACKINGS, layer_views
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import (
    KVCacheBlock,
    get_request_block_hasher,
    init_none_hash,
)
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

import vllm_kvcompress
from vllm_kvcompress.accounting import Plan, ceil_div
from vllm_kvcompress.config import parse_engine_config
from vllm_kvcompress.engine.compressor import Compressor
from vllm_kvcompress.engine.judge import Judge
from vllm_kvcompress.engine.scheduler import KVCompressAsyncScheduler, KVCompressScheduler
from vllm_kvcompress.engine.stash import Stash
from vllm_kvcompress.paging.manager import PerHeadManager
from vllm_kvcompress.paging.pool import PagePool
from vllm_kvcompress.paging.spec import PerHeadSpec
from vllm_kvcompress.plugin import register

DEMO_MODEL = str(Path(vllm_kvcompress.__file__).parent / "demo_model")
LAYERS, HEADS, GROUP, SIZE = 2, 2, 2, 4
TSP_LAYER = 0  # of two layers, the published middle
TAGS = 1 << 22  # exact in float32
HASH = get_hash_fn_by_name("sha256")


@dataclass(frozen=True)
class Climate:
    """What kind of storm: the engine's settings and the requests that arrive."""

    seed: int
    steps: int = 2000
    block_tokens: int = 16
    num_blocks: int = 48
    batch_tokens: int = 48
    max_requests: int = 8
    prefix_caching: bool = True
    asynchronous: bool = False
    kv_compress: dict | None = None
    knobs: bool = True
    arrival: float = 0.25
    abort: float = 0.01
    reset: float = 0.002
    shared_prefix: float = 0.4
    priority: bool = False
    store: bool = False
    tsp_tokens: int = 0  # hidden states for which there is room; 0: no prompt is propagated


@dataclass
class Expected:
    """What the test knows of one request, computed its own way."""

    plan: Plan
    prompt: list[int]
    tokens: list[int]  # prompt and everything it will ever say
    tags: np.ndarray  # int64 per position
    held: int = 0
    loaded: int = 0  # blocks that were allocated for a load
    lost: bool = False  # nothing of it came
    compressions: int = 0

    @property
    def layers(self) -> int:
        """How many see every token of its prompt."""
        return LAYERS if self.plan.tsp_tokens is None else TSP_LAYER + 1

    def tail_start(self, computed: int) -> int | None:
        """First position that attention reads by the block table; None: all of them."""
        point = self.plan.last_point(computed)
        if point is None and self.plan.tsp_tokens is not None:
            point = self.plan.prompt_tokens if computed >= self.plan.prompt_tokens else None
        size = self.plan.block_tokens
        return None if point is None else point // size * size


@dataclass
class Snapshot:
    """What held on the scheduler's side right after a step was scheduled."""

    arenas: dict[str, list[int]]
    natural: dict[str, list[int]]


@dataclass
class Tally:
    """What a storm has brought, so that a test can tell it from a breeze."""

    requests: int = 0
    finished: int = 0
    aborted: int = 0
    compressions: int = 0
    recompressions: int = 0
    preemptions: int = 0
    hit_tokens: int = 0
    steps: int = 0
    small_chunks: int = 0
    mixed_steps: int = 0
    loads: int = 0
    failed_loads: int = 0
    deferred_frees: int = 0
    propagated: int = 0
    full_windows: int = 0


class Storm:
    def __init__(self, climate: Climate) -> None:
        register()
        init_none_hash(HASH)
        self.climate = climate
        self.rng = random.Random(climate.seed)
        self.torch_rng = torch.Generator().manual_seed(climate.seed)
        self.scheduler = make_scheduler(climate)
        raw = self.scheduler.vllm_config.additional_config["kv_compress"]
        self.config = parse_engine_config(raw)
        views = layer_views(climate.num_blocks, LAYERS, HEADS, climate.block_tokens, SIZE)
        packing = PACKINGS[self.rng.choice(list(PACKINGS))](climate.block_tokens, SIZE)
        self.pool = PagePool(views, packing)
        self.storehouse = None
        if climate.store:
            self.storehouse = Storehouse(self.rng, self.scheduler.connector, views, packing)
        judge = Judge(self.config, self.pool, SIZE**-0.5)
        self.compressor = Compressor(self.config, self.pool, judge)
        self.manager = self.scheduler.per_head
        self.manager.propagating.capacity_tokens = climate.tsp_tokens
        self.stash = Stash(climate.tsp_tokens, 1, torch.float32, torch.device("cpu"))
        self.forget_reallocated(self.manager.block_pool)
        self.hasher = get_request_block_hasher(climate.block_tokens, HASH)
        self.expected: dict[str, Expected] = {}
        self.runner: dict[str, list[int]] = {}  # block ids
        self.known: dict[str, int] = {}  # tokens the runner knows of each request
        self.queue: deque = deque()
        self.written: dict[int, object] = {}  # block -> the hash under which it is complete
        self.history: list[list[int]] = []
        self.arenas_seen: dict[str, set[int]] = {}
        self.tally = Tally()
        self.limit = (climate.num_blocks - 1) * climate.block_tokens

    def forget_reallocated(self, pool) -> None:
        """A block allocated anew may be written, even if it will bear its old hash again."""
        allocate = pool.get_new_blocks

        def get_new_blocks(count):
            blocks = allocate(count)
            for block in blocks:
                self.written.pop(block.block_id, None)
            return blocks

        pool.get_new_blocks = get_new_blocks

    # The storm

    def run(self) -> Tally:
        block_pool = self.manager.block_pool
        initial = block_pool.get_num_free_blocks()
        for step in range(self.climate.steps):
            if self.rng.random() < self.climate.arrival and len(self.scheduler.requests) < 40:
                self.arrive()
            self.disturb()
            self.step()
            self.tally.steps = step + 1
        for _ in range(20_000):
            if not self.scheduler.has_requests() and not self.queue:
                break
            self.step()
        else:
            raise AssertionError(f"{len(self.scheduler.requests)} requests never end")
        if self.tally.requests != self.tally.finished + self.tally.aborted:
            raise AssertionError(f"requests got lost: {self.tally}")
        free = block_pool.get_num_free_blocks()
        assert free == initial, f"{initial} blocks were free at first, {free} in the end"
        assert not len(self.compressor.tables) or self.scheduler.finished_req_ids
        return self.tally

    def arrive(self) -> None:
        rng, climate = self.rng, self.climate
        most = min(self.limit - 2, 900, climate.tsp_tokens or 900)
        block = climate.block_tokens
        length = rng.choice(
            [
                rng.randint(1, 40),
                rng.randint(1, most),
                rng.randint(1, most // 2),
                block * 6,
                block * rng.randint(1, most // block),
                block * rng.randint(1, 8) + 1,
            ]
        )
        prompt = [rng.randrange(1, 2000) for _ in range(min(length, most))]
        if self.history and rng.random() < climate.shared_prefix:
            old = rng.choice(self.history)
            cut = rng.choice([len(old), rng.randint(1, len(old))])
            prompt = (old[:cut] + prompt[: rng.choice([0, 1, block, 100])])[:most]
        said = min(rng.choice([1, 2, 20, 60, 150]), self.limit - len(prompt))
        extra = {}
        if climate.knobs:
            presets = self.config.known_presets().values()
            names = [p.name for p in presets if climate.tsp_tokens or not p.propagates]
            name = rng.choice([*names, "off", None, None])
            extra = {"kv_compress": name} if name else {}
            if name != "off":
                extra |= rng.choice(
                    [
                        {},
                        {},
                        {"kv_compress_rate": rng.choice([1, 2, 2.5, 4, 16, 1000])},
                        {"kv_compress_budget": rng.randint(1, 300)},
                        {"kv_compress_question": rng.choice([1, 20, len(prompt) - 1, 400])},
                    ]
                )
        name = f"r{self.tally.requests}"
        params = SamplingParams(
            max_tokens=said, ignore_eos=True, temperature=0, extra_args=extra or None
        )
        priority = rng.randint(0, 3) if climate.priority else 0
        request = Request(
            name,
            list(prompt),
            params,
            None,
            block_hasher=self.hasher if climate.prefix_caching else None,
            priority=priority,
        )
        self.tally.requests += 1
        self.scheduler.add_request(request)
        plan = self.scheduler._planned[name][0]
        tokens = prompt + [rng.randrange(1, 2000) for _ in range(said + 1)]
        self.expected[name] = Expected(plan, prompt, tokens, tags_of(name, tokens, plan))
        self.history.append(tokens[: rng.choice([len(prompt), len(tokens)])])
        self.history = self.history[-6:]

    def disturb(self) -> None:
        live = [name for name, r in self.scheduler.requests.items() if not r.is_finished()]
        if live and self.rng.random() < self.climate.abort:
            name = self.rng.choice(live)
            self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
            self.end(name)
            self.tally.aborted += 1
        if self.rng.random() < self.climate.reset:
            # vLLM refuses to preempt for it while blocks are loaded or their freeing is deferred.
            self.scheduler.reset_prefix_cache(reset_running_requests=not self.storehouse)

    def end(self, name: str) -> None:
        self.arenas_seen.pop(name, None)

    def step(self) -> None:
        depth = 2 if self.climate.asynchronous else 1
        if self.scheduler.has_requests():
            before = {
                name: (request.num_computed_tokens, request.num_in_flight_tokens)
                for name, request in self.scheduler.requests.items()
            }
            step = self.scheduler.schedule()
            snapshot = self.check_scheduled(step, before)
            self.queue.append([step, snapshot, None])
            if self.rng.random() < 0.5:
                self.execute_all()
            if len(self.queue) < depth and self.scheduler.has_requests():
                return
        if self.queue:
            self.execute_all()
            step, _, output = self.queue.popleft()
            if step.total_num_scheduled_tokens or self.storehouse:
                requests = self.scheduler.requests
                live = {name for name in requests if not requests[name].is_finished()}
                self.scheduler.update_from_output(step, output)
                gone = live - set(self.scheduler.requests)
                self.note_losses(output)
                self.tally.finished += len(gone)
                for name in gone:
                    self.end(name)
            self.check_pool()

    def execute_all(self) -> None:
        for item in self.queue:
            if item[2] is None:
                item[2] = self.execute(item[0], item[1])

    def note_losses(self, output: ModelRunnerOutput) -> None:
        """Of a load that failed at its first block everything is freed again."""
        if output.kv_connector_output is None:
            return
        for name in output.kv_connector_output.finished_recving or ():
            request = self.scheduler.requests.get(name)
            if request is not None and name in self.scheduler.failed_recving_kv_req_ids:
                self.tally.failed_loads += 1
                self.expected[name].lost = request.num_computed_tokens == 0

    # The scheduler's side

    def check_scheduled(self, step: SchedulerOutput, before: dict) -> Snapshot:
        scheduler, manager = self.scheduler, self.manager
        scheduler.check_integrity()
        for name in step.preempted_req_ids or ():
            if name in self.expected:
                self.expected[name].held = self.expected[name].loaded = 0
                self.tally.preemptions += 1
                self.arenas_seen.pop(name, None)
        arenas, natural = {}, {}
        hits = {new.req_id: new.num_computed_tokens for new in step.scheduled_new_reqs}
        cached = step.scheduled_cached_reqs
        firsts = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True)) | hits
        self.tally.hit_tokens += sum(hits.values())
        loads = step.kv_connector_metadata.loads if self.storehouse else ()
        self.tally.loads += len(loads)
        for load in loads:
            want = self.expected[load.request_id]
            want.held = want.loaded = len(load.block_ids)
        for name, request in scheduler.requests.items():
            want = self.expected[name]
            if want.lost and request.status != RequestStatus.WAITING_FOR_REMOTE_KVS:
                want.lost, want.held, want.loaded = False, 0, 0
        for name, count in step.num_scheduled_tokens.items():
            want = self.expected[name]
            first, last = firsts[name], firsts[name] + count
            held = [block.block_id for block in manager.req_to_blocks[name]]
            if name in manager.requests_compressing():
                assert want.plan.is_point(last), f"{name}: an arena at {last}, no point"
                size = want.plan.arena_blocks
                held, arenas[name] = held[:-size], held[-size:]
                own = [b.block_id for b in manager._compressions[name].arenas[-1].blocks]
                assert arenas[name] == own, f"{name}: arena {own} travels as {arenas[name]}"
            else:
                assert not want.plan.is_point(last), f"{name}: no arena at point {last}"
            natural[name] = held
            point = want.plan.next_stop(first)
            assert point is None or last <= point, f"{name}: chunk {first}..{last} passes {point}"
            self.tally.small_chunks += first and count < 16 and last < len(want.prompt)
            _, flying = before[name]
            flying = flying if name not in (step.preempted_req_ids or ()) else 0
            processed = max(0, first - flying) if name not in hits else first
            want.held = blocks_expected(want, processed, last)
        for name, request in scheduler.requests.items():
            held, want = manager.blocks_held(name), self.expected[name]
            left_out = request in scheduler.running and name not in step.num_scheduled_tokens
            if left_out and held != want.held:  # vLLM freed, and then found no room for a chunk
                computed, flying = before[name]
                want.held = blocks_expected(want, max(0, computed - flying), computed)
            assert held == want.held, f"{name} holds {held} blocks, not {want.held}"
        self.check_published(step, firsts, natural, arenas, loads)
        self.check_pool()
        return Snapshot(arenas, natural)

    def check_published(self, step, firsts: dict, natural: dict, arenas: dict, loads) -> None:
        """A block complete under a hash is never written while it bears that hash."""
        blocks, size = self.manager.block_pool.blocks, self.climate.block_tokens
        touched = {block for load in loads for block in load.block_ids[load.first_token // size :]}
        assert all(blocks[block].block_hash is None for block in touched), "loaded over published"
        for name, ids in natural.items():
            first, last = firsts[name], firsts[name] + step.num_scheduled_tokens[name]
            for index in range(first // size, ceil_div(last, size)):
                block = ids[index]
                assert block != 0, f"{name} writes to the null block"
                touched.add(block)
        for name, ids in arenas.items():
            for block in ids:
                assert blocks[block].block_hash is None, f"arena block {block} of {name} published"
                assert block not in touched, f"arena block {block} of {name} is written as natural"
                touched.add(block)
        for name, ids in manager_blocks(self.manager):
            limit = self.expected[name].plan.publish_limit_tokens()
            first = len(ids) if limit is None else limit // size
            late = [block.block_id for block in ids[first:] if block.block_hash is not None]
            assert not late, f"{name}: blocks {late} saw a compressed context and are published"
        for block in touched:
            was, is_ = self.written.pop(block, None), blocks[block].block_hash
            assert was is None or was != is_, f"published block {block} is written"
        for block in blocks:
            if block.block_hash is None:
                self.written.pop(block.block_id, None)
            elif block.block_id not in touched:
                self.written[block.block_id] = block.block_hash

    def check_pool(self) -> None:
        """Every block is free or held by a request that can name it; arenas by one alone."""
        self.scheduler.check_integrity()
        manager, pool = self.manager, self.manager.block_pool
        owners: dict[int, int] = {}
        for _, blocks in manager_blocks(manager):
            for block in blocks:
                if not block.is_null:
                    owners[block.block_id] = owners.get(block.block_id, 0) + 1
        for name, compression in manager._compressions.items():
            for block in (block for arena in compression.arenas for block in arena.blocks):
                assert block.block_id not in owners, f"arena of {name} shares {block.block_id}"
                owners[block.block_id] = 1
        for _, blocks in self.scheduler.deferred_frees:
            self.tally.deferred_frees += 1
            for block in blocks:
                if not block.is_null:
                    owners[block.block_id] = owners.get(block.block_id, 0) + 1
        for block in pool.blocks:
            if not block.is_null:
                want = owners.get(block.block_id, 0)
                assert block.ref_cnt == want, f"{block.block_id}: {block.ref_cnt} refs, not {want}"
        free, total = pool.get_num_free_blocks(), pool.num_gpu_blocks - 1
        assert free + len(owners) == total, f"{free} free + {len(owners)} held != {total}"

    # The worker's side

    def execute(self, step: SchedulerOutput, snapshot: Snapshot) -> ModelRunnerOutput:
        compressor = self.compressor
        compressor.begin_step(step)
        due = {d.request_id: d.arena_blocks for d in compressor._due if d.arena_blocks is not None}
        assert due == snapshot.arenas, f"the worker compresses {due}, not {snapshot.arenas}"
        self.update_runner(step)
        for name in (*step.finished_req_ids, *(step.preempted_req_ids or ())):
            self.stash.release(name)
        names = list(step.num_scheduled_tokens)
        self.rng.shuffle(names)
        cached = step.scheduled_cached_reqs
        firsts = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        firsts |= {new.req_id: new.num_computed_tokens for new in step.scheduled_new_reqs}
        counts = [step.num_scheduled_tokens[name] for name in names]
        ends = np.array([firsts[n] + c for n, c in zip(names, counts, strict=True)], dtype=np.int64)
        for name, natural in snapshot.natural.items():
            for position, (mine, theirs) in enumerate(zip(self.runner[name], natural, strict=True)):
                assert theirs in (0, mine), f"{name} block {position}: {mine}, not {theirs}"
        for name, end, count in zip(names, ends.tolist(), counts, strict=True):
            self.write(name, end - count, end)
        if names:
            self.attend(names, counts, ends)
        for name, (first, count) in compressor.propagating.items():
            self.propagate(name, first, count)
        self.check_windows()
        told = self.storehouse.step(step.kv_connector_metadata) if self.storehouse else None
        compressor.finish_step(lambda name: self.runner[name])
        compressor.check_integrity()
        for name in due:
            self.check_arena(name, due[name])
            first = firsts[name] + step.num_scheduled_tokens[name]
            again = first != self.expected[name].plan.first_point
            self.tally.recompressions += again
            self.tally.compressions += not again
        return self.sample(names, ends, told)

    def update_runner(self, step: SchedulerOutput) -> None:
        """As `GPUModelRunner._update_states` treats block ids."""
        for name in step.finished_req_ids:
            self.runner.pop(name, None)
            self.known.pop(name, None)
        for new in step.scheduled_new_reqs:
            self.runner[new.req_id] = new.block_ids[0]
            self.known[new.req_id] = len(new.prompt_token_ids)
        cached = step.scheduled_cached_reqs
        for i, name in enumerate(cached.req_ids):
            ids = cached.new_block_ids[i]
            if name in cached.resumed_req_ids:
                assert ids is not None, f"{name} resumes without blocks"
                self.runner[name] = ids[0]
                prompt = len(self.expected[name].prompt)
                self.known[name] = prompt + cached.num_output_tokens[i]
            elif ids is not None:
                assert ids[0], f"{name}: an empty list of new blocks"
                self.runner[name].extend(ids[0])

    def write(self, name: str, first: int, end: int) -> None:
        """Write each token's key and value where vLLM's slot mapping points."""
        size, where = self.climate.block_tokens, torch.arange(first, end)
        blocks = torch.tensor(self.runner[name])[where // size]
        content = self.content(name, where)  # [L, H, T, D]
        prompt = end <= self.expected[name].plan.prompt_tokens
        layers = self.expected[name].layers if prompt else LAYERS
        self.put(self.pool.page_ids(blocks)[:layers], where % size, content[:layers])

    def put(self, pages: torch.Tensor, offsets: torch.Tensor, content: torch.Tensor) -> None:
        """Keys, and values that are their opposites, into `[L', H, T]` pages."""
        flat = self.pool.cache.view(-1, 2 * self.climate.block_tokens * SIZE)
        form_keys, form_values = self.pool._keys._where[offsets], self.pool._values._where[offsets]
        flat[pages[..., None], form_keys] = content
        flat[pages[..., None], form_values] = -content

    def propagate(self, name: str, first: int, count: int) -> None:
        """What the deep layers of a prompt see: nothing, and then its selected tokens."""
        plan, size = self.expected[name].plan, self.climate.block_tokens
        self.stash.put(name, plan.prompt_tokens, first, torch.zeros(count, 1))
        if first + count < plan.prompt_tokens:
            return
        natural = self.runner[name]
        selected = self.compressor.select(name, natural)
        self.stash.release(name)
        assert len(selected) == plan.tsp_tokens, f"{name}: {len(selected)} tokens go on"
        full, tail = divmod(plan.prompt_tokens, size)
        own = torch.tensor(natural[: len(selected) // size] + natural[full : full + (tail > 0)])
        where = torch.arange(len(selected))
        pages = self.pool.page_ids(own[where // size])[TSP_LAYER + 1 :]
        self.put(pages, where % size, self.content(name, selected)[TSP_LAYER + 1 :])
        self.tally.propagated += 1

    def content(self, name: str, positions: torch.Tensor) -> torch.Tensor:
        """`[L, H, T, D]`: whose token, where, and which lane."""
        tags = torch.from_numpy(self.expected[name].tags)[positions]
        out = torch.empty(LAYERS, HEADS, len(positions), SIZE)
        out[..., 0], out[..., 1] = tags, positions
        out[..., 2] = torch.arange(LAYERS * HEADS).view(LAYERS, HEADS, 1)
        out[..., 3] = (tags * 7 + positions) % 1000
        return out

    def attend(self, names: list[str], counts: list[int], ends: np.ndarray) -> None:
        """Read all that attention would read, and hand over the queries to keep aside."""
        starts = np.zeros(len(names) + 1, dtype=np.int32)
        np.cumsum(counts, out=starts[1:])
        captures = self.compressor.captures(names, starts)
        batch = self.compressor.lay_out(
            names, starts, ends.astype(np.int32), lambda name: self.runner[name]
        )
        rows = (
            {} if batch is None else {row: i for i, row in enumerate(batch.sequences.rows.tolist())}
        )
        tabled = {
            row for row, name in enumerate(names) if name in self.compressor.tables.requests()
        }
        assert set(rows) == tabled, f"rows {set(rows)} are laid out per head, not {tabled}"
        self.tally.mixed_steps += 0 < len(rows) < len(names)
        total, query = int(starts[-1]), None
        for row, name in enumerate(names):
            want, end = self.expected[name], int(ends[row])
            tail_start = want.tail_start(end - counts[row])
            assert (row in rows) == (tail_start is not None), f"{name} at {end}: compressed or not?"
            if tail_start is None:
                blocks = torch.tensor(self.runner[name][: ceil_div(end, self.climate.block_tokens)])
                keys, values = self.read(self.pool.page_ids(blocks)[: want.layers])
                self.compare(name, keys[:, :, :end], values[:, :, :end], torch.arange(end))
            else:
                self.check_row(name, batch, rows[row], row, starts, tail_start, end)
        if captures:
            for layer in range(LAYERS):
                query = torch.randn(total, HEADS * GROUP, SIZE, generator=self.torch_rng)
                for row, name in enumerate(names):
                    first, end = int(ends[row]) - counts[row], int(ends[row])
                    span = slice(int(starts[row]), int(starts[row + 1]))
                    query[span, :, 0] = torch.arange(first, end)[:, None].float()
                    query[span, :, 1] = float(int(name[1:]) * LAYERS + layer)
                for capture in captures:
                    capture.take(layer, query)

    def check_row(self, name, batch, i, row, starts, tail_start, end) -> None:
        size = self.climate.block_tokens
        span = np.arange(starts[row], starts[row + 1])
        for head in range(HEADS):
            sequence = i * HEADS + head
            a, b = batch.sequences.query_start_loc[sequence : sequence + 2].tolist()
            assert batch.sequences.tokens[a:b].tolist() == span.tolist(), (
                f"{name}: other tokens' queries"
            )
            assert batch.sequences.lanes[a:b].unique().tolist() == [head], (
                f"{name}: other heads' queries"
            )
        for layer in range(LAYERS):
            table = batch.block_table(layer)
            for head in range(HEADS):
                tokens = int(batch.seq_lens[layer, i * HEADS + head])
                pages = table[i * HEADS + head, : ceil_div(tokens, size)].long()
                keys = self.pool.keys(pages[None])[0, :tokens]
                values = self.pool.values(pages[None])[0, :tokens]
                positions = keys[:, 1].long()
                kept = tokens - (end - tail_start)
                assert kept > 0 and kept % size == 0, f"{name}: {kept} kept tokens"
                assert positions[kept:].tolist() == list(range(tail_start, end)), f"{name}: tail"
                order = positions.tolist()
                assert all(a < b for a, b in pairwise(order)), f"{name}: order"
                want = self.content(name, positions)[layer, head]
                assert torch.equal(keys, want), f"{name} ({layer}, {head}): foreign keys"
                assert torch.equal(values, -want), f"{name} ({layer}, {head}): foreign values"

    def read(self, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys = torch.stack([self.pool.keys(of_layer) for of_layer in pages])
        values = torch.stack([self.pool.values(of_layer) for of_layer in pages])
        return keys, values

    def compare(self, name: str, keys, values, positions) -> None:
        want = self.content(name, positions)[: len(keys)]
        if not torch.equal(keys, want):
            wrong = (keys != want).any(-1).any(0).any(0).nonzero().flatten().tolist()
            raise AssertionError(f"{name}: keys of positions {wrong[:5]}... are not its own")
        assert torch.equal(values, -want), f"{name}: values are not its own"

    def check_windows(self) -> None:
        """The queries kept aside find room, and are those of the right position and layer."""
        requests = self.compressor._requests.values()
        aside = [r.window.end - r.window.start for r in requests if r.window is not None]
        room = self.config.window_max_inflight_tokens
        assert sum(aside) <= room, f"{aside} queries, room for {room}"
        self.tally.full_windows += sum(aside) + 16 > room
        for due in self.compressor._due:
            request = self.compressor._requests[due.request_id]
            window = request.window
            if window is None:
                continue
            positions = window.positions().tolist()
            assert positions[-1] == due.point - 1
            assert len(positions) <= request.settings.window_tokens
            number = int(due.request_id[1:])
            for layer in range(LAYERS):
                queries = window.layer(layer, HEADS)
                got = queries[:, 0, 0, 0].tolist()
                assert got == positions, f"{due.request_id}: queries of {got}, not {positions}"
                assert queries[..., 1].unique().tolist() == [number * LAYERS + layer]

    def check_arena(self, name: str, blocks: list[int]) -> None:
        """All its pages are dealt out; protected tokens stay in every head."""
        plan = self.expected[name].plan
        request = self.compressor._requests[name]
        counts, ids = self.compressor.tables.arena(name)
        lanes = LAYERS * HEADS
        assert int(counts.sum()) == plan.arena_blocks * lanes, f"{name}: {counts.tolist()} pages"
        assert int(counts.min()) >= 1
        pages = sorted(
            page
            for layer in range(LAYERS)
            for head in range(HEADS)
            for page in ids[layer, head, : counts[layer, head]].tolist()
        )
        assert pages == sorted(b * lanes + lane for b in blocks for lane in range(lanes))
        sinks = min(request.settings.sink_tokens, len(self.expected[name].prompt))
        size = self.climate.block_tokens
        for layer in range(LAYERS):
            for head in range(HEADS):
                mine = ids[layer, head, : counts[layer, head]]
                kept = self.pool.keys(mine[None])[0, :, 1].long().tolist()
                assert kept[:sinks] == list(range(sinks))[: len(kept)], f"{name}: sinks lost"
                assert len(set(kept)) == len(kept) == int(counts[layer, head]) * size

    def sample(self, names: list[str], ends: np.ndarray, told) -> ModelRunnerOutput:
        sampled = []
        for name, end in zip(names, ends.tolist(), strict=True):
            if end < self.known[name]:
                sampled.append([])
                continue
            assert end == self.known[name], f"{name} computed {end} of {self.known[name]} tokens"
            self.known[name] += 1
            sampled.append([self.expected[name].tokens[end]])
        rows = {name: i for i, name in enumerate(names)}
        return ModelRunnerOutput(names, rows, sampled, kv_connector_output=told)


def manager_blocks(manager: PerHeadManager) -> list[tuple[str, list[KVCacheBlock]]]:
    """Each request's natural blocks, without the arena that travels behind them."""
    out = []
    for name, blocks in manager.req_to_blocks.items():
        transit = name in manager.requests_compressing()
        size = len(manager._compressions[name].arenas[-1].blocks) if transit else 0
        out.append((name, blocks[: len(blocks) - size]))
    return out


def blocks_expected(want: Expected, processed: int, computed: int) -> int:
    """Blocks held once a step is scheduled that ends at `computed` tokens.

    Every compression point reached brings an arena; the sources of one are freed only if it was
    processed before.
    """
    plan = want.plan
    computed = max(computed, want.loaded * plan.block_tokens)
    held = ceil_div(computed, plan.block_tokens)
    points, point = [], plan.next_point(0)
    while point is not None and point <= computed:
        points.append(point)
        point = plan.next_point(point)
    done = [point for point in points if point <= processed]
    if done:
        held -= done[-1] // plan.block_tokens
    live = len(points) - max(0, len(done) - 1)
    return held + live * plan.arena_blocks


def tags_of(name: str, tokens: list[int], plan: Plan) -> np.ndarray:
    """What tells a token's key from all others: the context it was computed in.

    Equal prefixes have equal keys, unless the context was compressed: then it is the request's
    own affair.
    """
    out, tag = np.empty(len(tokens), dtype=np.int64), 17
    for position, token in enumerate(tokens):
        tag = hash((tag, token))
        own = plan.tsp_tokens is not None
        own |= plan.first_point is not None and position >= plan.first_point
        out[position] = (hash((int(name[1:]), position, 5)) if own else tag) % TAGS
    return out


def make_scheduler(climate: Climate):
    """The scheduler as vLLM's `EngineCore` builds it, over one group of per-head attention."""
    settings = {**(climate.kv_compress or {"rate": 4})}
    if not climate.tsp_tokens:
        settings["tsp_max_inflight_tokens"] = 0
    if climate.store:
        settings["cachegen"] = {
            "store": tempfile.gettempdir(),  # looked at, and then replaced
            "levels": [4],
            "chunk_tokens": 2 * climate.block_tokens,
        }
    args = EngineArgs(
        model=DEMO_MODEL,
        dtype="float32",
        enforce_eager=True,
        max_model_len=4096,
        block_size=climate.block_tokens,
        max_num_batched_tokens=climate.batch_tokens,
        max_num_seqs=climate.max_requests,
        num_gpu_blocks_override=climate.num_blocks,
        enable_prefix_caching=climate.prefix_caching,
        skip_tokenizer_init=True,
        scheduling_policy="priority" if climate.priority else "fcfs",
        additional_config={"kv_compress": settings},
    )
    config = args.create_engine_config()
    config.scheduler_config.async_scheduling = climate.asynchronous
    config.cache_config.num_gpu_blocks = climate.num_blocks
    spec = PerHeadSpec(
        block_size=climate.block_tokens, num_kv_heads=HEADS, head_size=SIZE, dtype=torch.float32
    )
    group = KVCacheGroupSpec([f"layer{i}" for i in range(LAYERS)], spec)
    kind = KVCompressAsyncScheduler if climate.asynchronous else KVCompressScheduler
    return kind(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(climate.num_blocks, [], [group]),
        structured_output_manager=StructuredOutputManager(config),
        log_stats=False,
        block_size=climate.block_tokens,
        hash_block_size=climate.block_tokens,
    )
