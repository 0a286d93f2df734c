"""The worker's part: watch the steps go by, keep windows aside, compress when a point is due.

Knows vLLM only by the `SchedulerOutput` it is shown; what the model runner holds comes in as
arguments, so that another runner needs another caller and nothing here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from vllm.utils import length_from_prompt_token_ids_or_embeds
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput

from vllm_kvcompress import accounting
from vllm_kvcompress.accounting import Plan, Settings
from vllm_kvcompress.config import EngineConfig
from vllm_kvcompress.engine.batch import HeadBatch
from vllm_kvcompress.engine.candidates import Candidates, SelectedCandidates
from vllm_kvcompress.engine.clock import clock_of
from vllm_kvcompress.engine.judge import Judge
from vllm_kvcompress.engine.windows import Capture, QueryWindow
from vllm_kvcompress.paging.device_tables import DeviceTables
from vllm_kvcompress.paging.pool import PagePool
from vllm_kvcompress.paging.tables import PageTables
from vllm_kvcompress.policy.propagators import select_positions

BlockIds = Callable[[str], list[int]]
"""Natural block ids of a request, as the model runner knows them."""

Tables = PageTables | DeviceTables

NOBODY = "kv-compress warm-up"  # no request of vLLM's is called so

Span = tuple[int, int]
"""A step's part of a request: its first token and how many."""


@dataclass(slots=True)
class _Request:
    plan: Plan
    settings: Settings
    tsp_layer: int | None = None  # the last one that sees all of the prompt, if others do not
    window: QueryWindow | None = None
    positions: Tensor | None = None  # int32 [K*L*H*B] of the arena's tokens, if compressed again
    selected: Tensor | None = None  # int64 [m] positions that the deep layers have seen


@dataclass(frozen=True, slots=True)
class _Due:
    """A request whose prompt is complete, or whose next compression point is reached.

    arena_blocks: K ids; None where the deep layers hold less than the others and nothing
        is evicted.
    """

    request_id: str
    point: int
    arena_blocks: list[int] | None


class Compressor:
    """Compresses the requests of one worker.

    Args:
        pool: the worker's pages.
        judge: whom to ask what tokens are worth.
    """

    def __init__(self, config: EngineConfig, pool: PagePool, judge: Judge) -> None:
        self.pool = pool
        self.judge = judge
        self.tables = self._new_tables()
        self.clock = clock_of(pool.device)
        self._config = config
        self._requests: dict[str, _Request] = {}
        self._due: list[_Due] = []
        self._passing: dict[str, Span] = {}  # of windows
        self.propagating: dict[str, Span] = {}  # of prompts with token-selective propagation
        self._in_step = False

    def _new_tables(self) -> Tables:
        return PageTables(self.pool)

    # Before the runner sees the step

    def begin_step(self, step: SchedulerOutput) -> None:
        """Follow the scheduler's news and take the arenas off the new block ids."""
        for request_id in step.finished_req_ids:
            self.tables.remove(request_id)
            self._requests.pop(request_id, None)
        for request_id in step.preempted_req_ids or ():
            self._reset(request_id)
        self._in_step = bool(step.num_scheduled_tokens)  # else the runner may run a made-up batch
        self._due.clear()
        self._passing.clear()
        self.propagating.clear()
        for new in step.scheduled_new_reqs:
            self._enter(new)
            if new.req_id in self._requests:
                (blocks,) = new.block_ids
                count = step.num_scheduled_tokens[new.req_id]
                kept = self._schedule(new.req_id, new.num_computed_tokens, count, blocks)
                new.block_ids = (kept,)
        cached = step.scheduled_cached_reqs
        for index, request_id in enumerate(cached.req_ids):
            if request_id not in self._requests:
                continue
            if request_id in cached.resumed_req_ids:
                self._reset(request_id)
            ids = cached.new_block_ids[index]
            blocks = ids[0] if ids is not None else []
            first, count = cached.num_computed_tokens[index], step.num_scheduled_tokens[request_id]
            kept = self._schedule(request_id, first, count, blocks)
            if len(kept) != len(blocks):
                cached.new_block_ids[index] = (kept,) if kept else None

    def _enter(self, new: NewRequestData) -> None:
        params = new.sampling_params
        settings = self._config.settings_or_off(params.extra_args) if params else None
        if settings is None:
            return
        prompt_tokens = length_from_prompt_token_ids_or_embeds(
            new.prompt_token_ids, new.prompt_embeds
        )
        pool = self.pool
        plan = accounting.plan(prompt_tokens, pool.page_tokens, pool.num_blocks, settings)
        tsp_layer = None
        if plan.tsp_tokens is not None:
            preset = self._config.known_presets()[settings.preset]
            tsp_layer = preset.last_full_layer(pool.num_layers)
        if plan.first_point is not None or tsp_layer is not None:
            self._requests[new.req_id] = _Request(plan, settings, tsp_layer)

    def _reset(self, request_id: str) -> None:
        """A preempted request holds nothing: it will be computed and compressed again."""
        self.tables.remove(request_id)
        if request := self._requests.get(request_id):
            request.window = request.positions = request.selected = None

    def _schedule(self, request_id: str, first: int, count: int, blocks: list[int]) -> list[int]:
        """Note what this step means for a request; returns its natural new blocks."""
        request = self._requests[request_id]
        point = request.plan.next_stop(first)
        if point is None:
            return blocks
        propagates = request.plan.tsp_tokens is not None and point == request.plan.prompt_tokens
        if propagates:
            self.propagating[request_id] = (first, count)
        last_point = request.plan.last_point(first) or 0
        window_start = max(last_point, point - request.settings.window_tokens)
        asks = propagates or self.judge.policy(request.settings).scorer.needs_queries
        if first + count > window_start and asks:
            if request.window is None:
                layers = self.pool.num_layers
                request.window = QueryWindow(layers, window_start, point)
            self._passing[request_id] = (first, count)
        if first + count < point:
            return blocks
        if not request.plan.is_point(point):
            self._due.append(_Due(request_id, point, None))
            return blocks
        arena = request.plan.arena_blocks
        self._due.append(_Due(request_id, point, blocks[-arena:]))
        return blocks[:-arena]

    # Token-selective propagation, while the step's forward pass runs

    def plan_of(self, request_id: str) -> Plan:
        return self._requests[request_id].plan

    def window_of(self, request_id: str) -> QueryWindow:
        window = self._requests[request_id].window
        assert window is not None
        return window

    def tsp_layer(self, request_id: str) -> int:
        """The last layer at which a request in `propagating` sees all of its prompt."""
        layer = self._requests[request_id].tsp_layer
        assert layer is not None
        return layer

    def select(self, request_id: str, natural: list[int]) -> Tensor:
        """Positions that go on above `tsp_layer`, int64 `[m]`, once its last chunk is there."""
        request, pool = self._requests[request_id], self.pool
        n, selected = request.plan.prompt_tokens, request.plan.tsp_tokens
        propagator, window = self.judge.policy(request.settings).propagator, request.window
        assert selected is not None and propagator is not None and window is not None
        layer = self.tsp_layer(request_id)
        blocks = pool.ids(natural[: accounting.ceil_div(n, pool.page_tokens)])
        positions = torch.arange(n, device=pool.device)
        everything = Candidates(pool.page_ids(blocks), positions, None)
        saliency = self.judge.saliency(propagator, everything.of_layer(layer), layer, window)
        last = max(n % pool.page_tokens, len(window.positions()))
        request.selected = select_positions(saliency, selected, min(last, selected))
        return request.selected

    # While the runner prepares and runs the step

    def lay_out(
        self,
        request_ids: Sequence[str],
        query_start: np.ndarray,
        seq_lens: np.ndarray,
        block_ids: BlockIds,
    ) -> HeadBatch | None:
        """The compressed requests of a step's batch as a batch of heads, None without any.

        Args:
            request_ids: the batch's requests, row by row.
            query_start: int `[num_reqs + 1]` first token of each row.
            seq_lens: int `[num_reqs]` tokens of each once the step is done.
        """
        assert isinstance(self.tables, PageTables)
        slots = self.rows(request_ids)
        if not slots:
            return None
        slots.sort(key=lambda pair: pair[1])
        rows = [row for row, _ in slots]
        natural = [block_ids(request_ids[row]) for row in rows]
        ends = seq_lens[rows].astype(np.int64)
        return HeadBatch.build(self.tables, slots, query_start, ends, natural)

    def captures(self, request_ids: Sequence[str], query_start: np.ndarray) -> list[Capture]:
        """The queries of the step's batch to keep aside; none outside a step."""
        captures: list[Capture] = []
        if not self._in_step or not self._passing:
            return captures
        for row, request_id in enumerate(request_ids):
            if span := self._passing.get(request_id):
                window = self._requests[request_id].window
                capture = window.capture(*span, int(query_start[row])) if window else None
                captures += [capture] if capture else []
        return captures

    def rows(self, request_ids: Sequence[str]) -> list[tuple[int, int]]:
        """(row, slot in `tables`) of the batch's compressed requests; none outside a step."""
        if not self._in_step or not len(self.tables):
            return []
        found = enumerate(map(self.tables.slot, request_ids))
        return [(row, slot) for row, slot in found if slot is not None]

    @property
    def keeps_queries(self) -> bool:
        """Whether this step's queries must be kept aside, which no captured graph does."""
        return bool(self._passing)

    # After the forward pass

    def finish_step(self, block_ids: BlockIds) -> None:
        """Compress the requests whose point this step has reached."""
        self._in_step = False
        for due in self._due:
            with self.clock.timed():
                if due.arena_blocks is None:
                    self._hold(due, block_ids(due.request_id))
                else:
                    self._compress(due, due.arena_blocks, block_ids(due.request_id))
        self._due.clear()

    def _hold(self, due: _Due, natural: list[int]) -> None:
        """Let attention read what each layer holds of a prompt, in the pages where it is."""
        request, pool = self._requests[due.request_id], self.pool
        assert request.selected is not None
        full = due.point // pool.page_tokens
        counts = torch.full((pool.num_layers, pool.num_heads), full, device=pool.device)
        counts[self.tsp_layer(due.request_id) + 1 :] = len(request.selected) // pool.page_tokens
        self.tables.hold(due.request_id, counts, natural[:full])
        request.window = request.selected = None

    def _compress(self, due: _Due, arena: list[int], natural: list[int]) -> None:
        request = self._requests[due.request_id]
        settings, pool = request.settings, self.pool
        full_tokens = request.plan.tail_start_block(due.point) * pool.page_tokens
        candidates = self._candidates(due, request, natural)
        policy = self.judge.policy(settings)
        scores = self.judge.scores(policy, candidates, request.window)
        if candidates.valid is None:
            scores = scores[..., :full_tokens]
        sinks, recent = accounting.protected_tokens(due.point, pool.page_tokens, settings)
        total_pages = len(arena) * pool.pages_per_block
        tokens, page_tokens = scores.shape[-1], pool.page_tokens
        kept = policy.keep(
            scores, total_pages, page_tokens, sinks, recent, candidates.valid, inplace=True
        )
        del scores
        arena_blocks = pool.ids(arena)
        self._copy(candidates.pages, tokens, kept.indices, arena_blocks)
        if again := request.plan.slack_blocks is not None:
            request.positions = candidates.positions_of(kept.indices)
        self.tables.enter(due.request_id, kept.pages, arena_blocks, full_tokens, again)
        request.window = request.selected = None

    def _copy(self, candidates: Tensor, tokens: int, kept: Tensor, arena_blocks: Tensor) -> None:
        """Copy kept tokens, indices into `[L, H, tokens]` of whole pages, into the arena."""
        pool = self.pool
        full_pages = candidates[..., : tokens // pool.page_tokens].flatten()
        page = kept // pool.page_tokens
        offsets = kept - page * pool.page_tokens
        pool.copy_tokens(full_pages[page], offsets, pool.block_pages(arena_blocks))

    def _candidates(self, due: _Due, request: _Request, natural: list[int]) -> Candidates:
        pool = self.pool
        blocks = pool.ids(natural[: accounting.ceil_div(due.point, pool.page_tokens)])
        if request.selected is not None:
            layer, pages = self.tsp_layer(due.request_id), pool.page_ids(blocks)
            return SelectedCandidates.of(
                pages, pool.page_tokens, due.point, request.selected, layer
            )
        if self.tables.slot(due.request_id) is None:
            positions = torch.arange(due.point, device=pool.device)
            return Candidates(pool.page_ids(blocks), positions, None)
        assert request.plan.slack_blocks is not None and request.positions is not None
        tail = pool.page_ids(blocks[-request.plan.slack_blocks :])
        counts, arena = self.tables.arena(due.request_id)
        return Candidates.kept_before(
            counts, arena, tail, request.positions, due.point, pool.page_tokens
        )

    def warm_up(self, query_heads: int, dtype: torch.dtype) -> None:
        """Compress a made-up prompt, so that what compiles at its first call has done so.

        Writes pages: no request may be there yet. Nothing happens where only requests that ask
        for it are compressed.
        """
        pool, settings = self.pool, self._config.settings_or_off(None)
        if settings is None:
            return
        n = accounting.ceil_div(max(1, settings.window_tokens), pool.page_tokens) * pool.page_tokens
        while (
            plan := accounting.plan(n, pool.page_tokens, pool.num_blocks, settings)
        ).first_point != n:
            n *= 2
            if n >= pool.num_blocks * pool.page_tokens:
                return
        window = QueryWindow(pool.num_layers, max(0, n - settings.window_tokens), n)
        query = torch.zeros(1, query_heads, pool.head_size, dtype=dtype, device=pool.device)
        window.queries(query).zero_()
        self._requests[NOBODY] = _Request(plan, settings, window=window)
        ids = list(range(pool.num_blocks))
        arena = ids[-plan.arena_blocks :]
        self._compress(_Due(NOBODY, n, arena), arena, ids[: n // pool.page_tokens])
        self.tables.remove(NOBODY)
        del self._requests[NOBODY]

    def check_integrity(self) -> None:
        """Raise unless every compressed request is known and no page is read by two heads."""
        self.tables.check_integrity()
        if stray := set(self.tables.requests()) - set(self._requests):
            raise RuntimeError(f"{len(stray)} page tables belong to no request")
