"""The scheduler tells the block manager each request's plan and ends chunks where it must.

Extends `vllm.v1.core.sched.scheduler.Scheduler` and its asynchronous sibling; no method of
theirs is copied.
"""

from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import Request, RequestStatus

from vllm_kvcompress import accounting
from vllm_kvcompress.accounting import Plan, Settings
from vllm_kvcompress.config import EngineConfig, parse_engine_config
from vllm_kvcompress.engine.stats import STATS_KEY, RequestRecord, Totals, WorkerStats
from vllm_kvcompress.paging.manager import PerHeadManager, manager_of
from vllm_kvcompress.presets import OFF


class _PerHead(Scheduler):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        raw = self.vllm_config.additional_config["kv_compress"]
        self.kv_compress: EngineConfig = parse_engine_config(raw)
        self.per_head: PerHeadManager = manager_of(self.kv_cache_manager)
        self.totals = Totals(pages_per_block=_pages_per_block(self.kv_cache_config))
        self._planned: dict[str, tuple[Plan, Settings | None]] = {}
        self.per_head.propagating.capacity_tokens = self.kv_compress.tsp_max_inflight_tokens or 0
        self.per_head.windows.capacity_tokens = self.kv_compress.window_max_inflight_tokens or 0
        if self.connector is not None:
            self.connector.hit_limit = self._hit_limit
            self.connector.publish_limit = self._publish_limit

    def add_request(self, request: Request) -> None:
        if request.request_id not in self.requests:
            settings = self._settings(request)
            plan = accounting.plan(
                request.num_prompt_tokens,
                self.per_head.block_size,
                self.per_head.block_pool.num_gpu_blocks,
                settings,
            )
            self._planned[request.request_id] = (plan, settings)
            window_tokens = settings.window_tokens if settings else 0
            self.per_head.set_plan(request.request_id, plan, window_tokens)
        super().add_request(request)

    def _settings(self, request: Request) -> Settings | None:
        params = request.sampling_params
        if params is None:
            return None
        if request.resumable:  # its prompt grows between chunks; workers read the same knob
            params.extra_args = {**(params.extra_args or {}), "kv_compress": OFF}
        return self.kv_compress.settings_or_off(params.extra_args)

    def _get_local_prefix_cache_hit(self, request: Request) -> tuple[KVCacheBlocks, int, int, bool]:
        blocks, hit_tokens, boundary, diverged = super()._get_local_prefix_cache_hit(request)
        limit = self._hit_limit(request)
        if limit is not None and hit_tokens > limit:
            blocks = self.kv_cache_manager.truncate_computed_blocks(blocks, limit)
            return blocks, limit, 0, diverged
        return blocks, hit_tokens, boundary, diverged

    def _hit_limit(self, request: Request) -> int | None:
        """How many tokens may come from a cache: the window's are to be computed."""
        plan, settings = self._planned[request.request_id]
        return plan.hit_limit_tokens(settings.window_tokens) if settings else None

    def _publish_limit(self, request: Request) -> int | None:
        """How many tokens' blocks may leave the request, for a cache or a store."""
        plan, _ = self._planned[request.request_id]
        return plan.publish_limit_tokens()

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        """End a chunk where what follows must see the kept pages, or the propagated tokens.

        While a compression is in flight its sources are held: until they are free, only a single
        token goes on, and no further compression starts. Prompts to be propagated and windows of
        queries wait for room in the workers' memory.
        """
        num_new_tokens = super()._reserve_prefill_lookahead(
            request, num_computed_tokens, num_new_tokens
        )
        processed = num_computed_tokens - request.num_in_flight_tokens
        waits = self.per_head.is_compressing(request.request_id, processed)
        if waits:
            num_new_tokens = min(num_new_tokens, 1)
        if not self.per_head.has_room_to_propagate(request.request_id):
            return 0
        num_new_tokens = self.per_head.tokens_with_room(
            request.request_id, num_computed_tokens, num_new_tokens
        )
        point = self._planned[request.request_id][0].next_stop(num_computed_tokens)
        if point is None or num_computed_tokens + num_new_tokens < point:
            return num_new_tokens
        return point - num_computed_tokens - waits

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        super()._update_after_schedule(scheduler_output)
        for request_id in self.per_head.requests_compressing():
            plan, settings = self._planned[request_id]
            assert settings is not None
            computed = self.requests[request_id].num_computed_tokens
            self.totals.compressed(RequestRecord.of(request_id, plan, settings, computed))

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        plan, settings = self._planned[request.request_id]
        aborted = request.status == RequestStatus.FINISHED_ABORTED
        self.totals.ended(request.request_id, plan, settings, aborted)
        return super()._free_request(request, *args, **kwargs)

    def _free_blocks(self, request: Request) -> None:
        super()._free_blocks(request)
        self.per_head.forget(request.request_id)
        del self._planned[request.request_id]

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """vLLM's statistics with ours under a key of their own in `kv_connector_stats`."""
        args, worker_stats = _take_worker_stats(args)
        if worker_stats is not None and self.log_stats:
            self.totals.add(worker_stats)
        stats = super().make_stats(*args, **kwargs)
        if stats is not None and self.totals.changed():
            self.totals.blocks_freed = self.per_head.freed_blocks
            payload = {STATS_KEY: self.totals.snapshot()}
            stats.kv_connector_stats = {**(stats.kv_connector_stats or {}), **payload}
        return stats

    def check_integrity(self) -> None:
        """Raise unless blocks and plans add up; see `PerHeadManager.check_integrity`."""
        self.per_head.check_integrity()
        if set(self._planned) != set(self.requests):
            raise RuntimeError(f"{len(self._planned)} plans for {len(self.requests)} live requests")


class KVCompressScheduler(_PerHead):
    """`Scheduler` with per-head compression."""


class KVCompressAsyncScheduler(_PerHead, AsyncScheduler):
    """`AsyncScheduler` with per-head compression."""


def _take_worker_stats(args: tuple[Any, ...]) -> tuple[tuple[Any, ...], WorkerStats | None]:
    """Split `make_stats`' positional arguments from what our worker sent along."""
    for index, value in enumerate(args):
        if isinstance(value, WorkerStats):
            return (*args[:index], value.connector, *args[index + 1 :]), value
    return args, None


def _pages_per_block(kv_cache_config: Any) -> int:
    (group,) = kv_cache_config.kv_cache_groups
    return len(group.layer_names) * group.kv_cache_spec.num_kv_heads
