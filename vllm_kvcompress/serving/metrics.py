"""Our figures on vLLM's `/metrics`: taken out of its statistics before its own loggers look.

The scheduler sends `Totals.snapshot()` (`engine/stats.py`) under `STATS_KEY` of
`SchedulerStats.kv_connector_stats`.
"""

from collections.abc import Mapping
from typing import Any

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from vllm_kvcompress.config import REFUSAL_REASONS
from vllm_kvcompress.engine.stats import STATS_KEY
from vllm_kvcompress.serving.snapshots import Snapshots
from vllm_kvcompress.transport.stats import TIMELINE
from vllm_kvcompress.transport.timeline import Timelines

PREFIX = "vllm:kv_compress_"
LABELS = ["model_name", "engine"]
KERNELS = ["attention", "compaction"]
SECONDS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class Series:
    """The Prometheus series of this process; counters grow by what a snapshot adds."""

    def __init__(self, model_name: str, registry: Any = REGISTRY) -> None:
        def counter(name: str, documentation: str, *labels: str) -> Counter:
            return Counter(PREFIX + name, documentation, [*LABELS, *labels], registry=registry)

        self._model_name = model_name
        self._requests = counter(
            "requests", "Requests ended, by preset and by what became of them.", "policy", "outcome"
        )
        self._by_policy = {
            "prompt_tokens": counter(
                "prompt_tokens", "Prompt tokens of the requests compressed.", "policy"
            ),
            "held_tokens": counter(
                "held_tokens", "Tokens held for them per head, right after.", "policy"
            ),
        }
        self._plain = {
            "recompressions": counter("recompressions", "Compressions after a request's first."),
            "blocks_freed": counter("blocks_freed", "KV cache blocks freed by compression."),
            "pages_freed": counter("pages_freed", "The same in pages, one layer and head each."),
        }
        self._seconds = Histogram(
            PREFIX + "compression_seconds",
            "Seconds that compressing took, per engine step that did.",
            LABELS,
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        self._kernels = Gauge(
            PREFIX + "kernels_info",
            "Always 1; whose kernels attend and copy kept tokens, `+` where it goes by size.",
            [*LABELS, *KERNELS],
            multiprocess_mode="mostrecent",
            registry=registry,
        )

    def add(self, engine: int, payload: Mapping[str, Any]) -> None:
        """Add what happened between `payload["before"]` and `payload`."""
        labels, before = (self._model_name, str(engine)), payload["before"]
        counted = {(policy, outcome): n for policy, outcome, n in before.get("requests", ())}
        for policy, outcome, count in payload["requests"]:
            grown = count - counted.get((policy, outcome), 0)
            self._requests.labels(*labels, policy, outcome).inc(grown)
        for name, series in self._by_policy.items():
            for policy, count in payload[name].items():
                series.labels(*labels, policy).inc(count - before.get(name, {}).get(policy, 0))
        for name, series in self._plain.items():
            series.labels(*labels).inc(payload[name] - before.get(name, 0))
        for seconds in payload["seconds"]:
            self._seconds.labels(*labels).observe(seconds)
        if kernels := payload["kernels"]:
            self._kernels.labels(*labels, *("+".join(kernels[task]) for task in KERNELS)).set(1)

    def show(self, engine: int) -> None:
        """Make the series without further labels appear at zero."""
        for series in (*self._plain.values(), self._seconds):
            series.labels(self._model_name, str(engine))


class KVCompressStatLogger(AggregateStatLoggerBase):
    """Must run before vLLM's own loggers, which refuse figures of a connector they lack."""

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int]) -> None:
        self._model_name = vllm_config.model_config.served_model_name
        self._engines = engine_indexes
        self._series: Series | None = None
        self.snapshots = Snapshots()
        self.timelines = Timelines()

    def log_engine_initialized(self) -> None:
        """Register the series: vLLM's own logger, built after us, would unregister them."""
        self._series = Series(self._model_name)
        for engine in self._engines:
            self._series.show(engine)
        for reason in REFUSAL_REASONS:
            refusals_counter().labels(self._model_name, reason)

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        payload = take_payload(scheduler_stats)
        if scheduler_stats and scheduler_stats.kv_connector_stats:
            self.timelines.add(scheduler_stats.kv_connector_stats.get(TIMELINE, ()))
        if payload is None:
            return
        if self._series is None:
            self.log_engine_initialized()
        self._series.add(engine_idx, payload)  # type: ignore[union-attr]
        self.snapshots.put(engine_idx, payload)


def take_payload(scheduler_stats: Any) -> dict[str, Any] | None:
    """Our part of `kv_connector_stats`, removed; None again where nothing else was in it."""
    stats = scheduler_stats and scheduler_stats.kv_connector_stats
    if not stats or STATS_KEY not in stats:
        return None
    rest = {key: value for key, value in stats.items() if key != STATS_KEY}
    scheduler_stats.kv_connector_stats = rest or None
    return stats[STATS_KEY]


def refusals_counter(registry: Any = REGISTRY) -> Counter:
    """The counter of refused requests: found where it is registered, else made."""
    name = PREFIX + "refusals"
    found = registry._names_to_collectors.get(name)
    documentation = "Requests refused at admission for a bad knob, by reason."
    return found or Counter(name, documentation, ["model_name", "reason"], registry=registry)
