"""The connector's figures: counters by name, which add up over workers and time, and timelines."""

import threading
from dataclasses import dataclass
from typing import Any

from prometheus_client import Counter, Gauge
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from vllm_kvcompress.transport.timeline import Mark

MARKS_KEPT = 4096
# name -> (help, the label that follows a colon in the counter's name)
COUNTERS = {
    "loaded_bytes": ("Bytes fetched from the store", None),
    "stored_bytes": ("Bytes put into the store", None),
    "loaded_raw_bytes": ("KV cache bytes that the fetched chunks decoded to", None),
    "stored_raw_bytes": ("KV cache bytes that the stored chunks were made of", None),
    "loaded_chunks": ("Chunks loaded, by level", "level"),
    "stored_chunks": ("Chunks stored, by level", "level"),
    "hit_tokens": ("Prompt tokens found in the store", None),
    "missed": ("Chunks that were looked for and recomputed, by reason", "reason"),
    "not_stored": ("Chunks computed but not stored, by reason", "reason"),
    "fetch_seconds": ("Seconds in the store's get", None),
    "decode_seconds": ("Seconds decoding and writing chunks", None),
    "encode_seconds": ("Seconds encoding chunks", None),
    "put_seconds": ("Seconds in the store's put", None),
}
# What goes up and down travels as its changes, which add up too.
GAUGES = {
    "loads_in_flight": "Requests whose chunks are being fetched",
    "saves_queued": "Chunks that wait to be encoded and stored",
    "save_queue_bytes": "Bytes of KV cache in them",
}
TIMELINE = "timeline"


@dataclass
class CacheGenStats(KVConnectorStats):
    """`data` maps a counter's name, or `name:label`, to what it grew by; `timeline` to marks."""

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> "CacheGenStats":
        for name, value in other.data.items():
            self.data[name] = self.data[name] + value if name in self.data else value
        return self

    def reduce(self) -> dict[str, int | float]:
        return {name: value for name, value in sorted(self.data.items()) if name != TIMELINE}

    def is_empty(self) -> bool:
        return not self.data


class Tally:
    """Counters and marks that threads add to. `take` hands out what is new."""

    def __init__(self) -> None:
        self.totals: dict[str, float] = {}
        self._new: dict[str, float] = {}
        self._marks: list[Mark] = []
        self._lock = threading.Lock()

    def add(self, name: str, value: float = 1, label: Any = None) -> None:
        key = name if label is None else f"{name}:{label}"
        with self._lock:
            self._new[key] = self._new.get(key, 0) + value
            self.totals[key] = self.totals.get(key, 0) + value

    def mark(self, mark: Mark) -> None:
        with self._lock:
            self._marks.append(mark)
            del self._marks[:-MARKS_KEPT]

    def take(self) -> CacheGenStats | None:
        with self._lock:
            new: dict[str, Any] = {name: value for name, value in self._new.items() if value}
            marks, self._new, self._marks = self._marks, {}, []
        if marks:
            new[TIMELINE] = [list(mark) for mark in marks]
        return CacheGenStats(new) if new else None


class CacheGenMetrics(KVConnectorPromMetrics):
    """`vllm:cachegen_*` on the server's `/metrics`."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        counter, gauge = self._counter_cls, self._gauge_cls
        self._gauges: dict[str, Gauge] = {
            name: gauge(
                name=f"vllm:cachegen_{name}",
                documentation=text,
                labelnames=self._labelnames,
                multiprocess_mode="sum",
            )
            for name, text in GAUGES.items()
        }
        self._counters: dict[str, Counter] = {
            name: counter(
                name=f"vllm:cachegen_{name}",
                documentation=text,
                labelnames=[*self._labelnames, *([label] if label else [])],
            )
            for name, (text, label) in COUNTERS.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        values = self.per_engine_labelvalues[engine_idx]
        for key, value in transfer_stats_data.items():
            name, _, label = key.partition(":")
            if name in self._counters:
                labels = [*values, label] if label else values
                self._counters[name].labels(*labels).inc(value)
            elif name in self._gauges:
                self._gauges[name].labels(*values).inc(value)
