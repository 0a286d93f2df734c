"""Figures of what was compressed: counted in the scheduler, timed in the worker.

They travel as vLLM's own statistics do: the worker's in `KVConnectorOutput`, the scheduler's in
`SchedulerStats.kv_connector_stats`, under `STATS_KEY`.
"""

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats

from vllm_kvcompress.accounting import Plan, Settings

STATS_KEY = "kv_compress"
RECENT_REQUESTS = 64


@dataclass
class WorkerStats(KVConnectorStats):
    """A worker's news of a step, to the scheduler.

    `data`: "seconds" that each compression took; in the first step, "kernels": by what they do,
    whose they are (`page_kernels.Choice`). A KV connector's own statistics of the step ride along.
    """

    connector: KVConnectorStats | None = None

    @staticmethod
    def of(seconds: list[float], kernels: Mapping[str, Iterable[str]]) -> "WorkerStats":
        return WorkerStats({"seconds": seconds, "kernels": dict(kernels)})

    def reset(self) -> None:
        self.data, self.connector = {"seconds": [], "kernels": {}}, None

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        theirs: KVConnectorStats | None = other
        if isinstance(other, WorkerStats):
            self.data["seconds"] += other.data["seconds"]
            add_names(self.data["kernels"], other.data["kernels"])
            theirs = other.connector
        if theirs is not None:
            self.connector = self.connector.aggregate(theirs) if self.connector else theirs
        return self

    def reduce(self) -> dict[str, int | float]:
        return {"compressions": len(self.data["seconds"])}

    def is_empty(self) -> bool:
        return not any(self.data.values())


def add_names(kernels: dict[str, list[str]], others: Mapping[str, Iterable[str]]) -> None:
    """Add the names of other kernels for each of some tasks, each name once."""
    for task, names in others.items():
        kernels[task] = sorted({*kernels.get(task, ()), *names})


@dataclass(slots=True)
class RequestRecord:
    """What one compression did to one request; blocks and tokens as in the glossary."""

    request_id: str
    preset: str
    prompt_tokens: int
    computed_tokens: int
    blocks_before: int
    blocks_after: int
    held_tokens: int
    is_recompression: bool

    @staticmethod
    def of(request_id: str, plan: Plan, settings: Settings, computed: int) -> "RequestRecord":
        tail_tokens = computed - plan.tail_start_block(computed) * plan.block_tokens
        after = plan.blocks_held(computed)
        freed = plan.tail_start_block(computed)
        if again := computed != plan.first_point:
            assert plan.slack_blocks is not None
            freed = plan.arena_blocks + plan.slack_blocks
        return RequestRecord(
            request_id,
            settings.preset,
            plan.prompt_tokens,
            computed,
            after - plan.arena_blocks + freed,
            after,
            plan.arena_blocks * plan.block_tokens + tail_tokens,
            again,
        )


@dataclass
class Totals:
    """Counters since start-up; `snapshot()` is plain data for the API process."""

    pages_per_block: int
    requests: Counter[tuple[str, str]] = field(default_factory=Counter)
    prompt_tokens: Counter[str] = field(default_factory=Counter)
    held_tokens: Counter[str] = field(default_factory=Counter)
    recompressions: int = 0
    blocks_freed: int = 0
    seconds: list[float] = field(default_factory=list)
    kernels: dict[str, list[str]] = field(default_factory=dict)
    recent: deque[RequestRecord] = field(default_factory=lambda: deque(maxlen=RECENT_REQUESTS))
    _compressed: set[str] = field(default_factory=set)
    _changed: bool = False
    _sent: dict[str, Any] = field(default_factory=dict)
    _number: int = 0

    def compressed(self, record: RequestRecord) -> None:
        if record.request_id not in self._compressed:
            self._compressed.add(record.request_id)
            self.prompt_tokens[record.preset] += record.prompt_tokens
            self.held_tokens[record.preset] += record.held_tokens
        elif record.is_recompression:
            self.recompressions += 1
        self.recent.append(record)
        self._changed = True

    def ended(self, request_id: str, plan: Plan, settings: Settings | None, aborted: bool) -> None:
        preset = settings.preset if settings else "off"
        if request_id in self._compressed:
            outcome = "compressed"
            self._compressed.discard(request_id)
        elif settings is None:
            outcome = "off"
        elif aborted:
            outcome = "aborted"
        elif plan.tsp_tokens is not None:
            outcome = "propagated"
        else:
            outcome = "left_alone"
        self.requests[preset, outcome] += 1
        self._changed = True

    def add(self, worker: WorkerStats) -> None:
        self.seconds += worker.data["seconds"]
        add_names(self.kernels, worker.data["kernels"])
        self._changed = self._changed or not worker.is_empty()

    def changed(self) -> bool:
        return self._changed

    def snapshot(self) -> dict[str, Any]:
        """Counters since start-up, and the `seconds` of compressions since the last snapshot.

        vLLM hands each snapshot to one of the API processes, whichever has an answer coming. So
        it is numbered, and brings along `before`, the counters of the snapshot before it: any
        process can count the difference without having seen the others.
        """
        seconds, self.seconds, self._changed = self.seconds, [], False
        counters: dict[str, Any] = {
            "requests": [[*key, count] for key, count in self.requests.items()],
            "prompt_tokens": dict(self.prompt_tokens),
            "held_tokens": dict(self.held_tokens),
            "recompressions": self.recompressions,
            "blocks_freed": self.blocks_freed,
            "pages_freed": self.blocks_freed * self.pages_per_block,
        }
        before, self._sent = self._sent, counters
        self._number += 1
        return {
            **counters,
            "before": before,
            "number": self._number,
            "seconds": seconds,
            "kernels": self.kernels,
            "recent": [asdict(record) for record in self.recent],
        }
