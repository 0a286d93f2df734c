"""Every query of the dashboard asks for a series and labels that the server exports."""

import inspect
import json
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from vllm.v1.metrics import loggers

from vllm_kvcompress.serving.metrics import PREFIX, Series, refusals_counter
from vllm_kvcompress.transport.stats import COUNTERS, GAUGES, CacheGenMetrics

BOARD = Path(__file__).parents[2] / "docker/grafana/dashboards/kv-compress.json"
STEP = {
    "requests": [["snapkv", "compressed", 1]],
    "prompt_tokens": {"snapkv": 300},
    "held_tokens": {"snapkv": 100},
    "recompressions": 0,
    "blocks_freed": 10,
    "pages_freed": 160,
    "seconds": [0.004],
    "kernels": {"attention": ["cuda"], "compaction": ["cuda"]},
    "before": {},
}


def queries():
    board = json.loads(BOARD.read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    return asked + [variable["definition"] for variable in board["templating"]["list"]]


STORE = {name: label for name, (_, label) in COUNTERS.items()} | dict.fromkeys(GAUGES)


def of_store(registry) -> CacheGenMetrics:
    types = {kind: partial(kind, registry=registry) for kind in (Counter, Gauge, Histogram)}
    config = SimpleNamespace(kv_transfer_config=None)
    return CacheGenMetrics(config, types, ["model_name", "engine"], {0: ["m", "0"]})


@pytest.fixture(scope="module")
def exported():
    """Name of each of our series -> its labels."""
    registry = CollectorRegistry()
    series = Series("m", registry)
    series.show(0)
    series.add(0, STEP)
    refusals_counter(registry).labels("m", "bad_rate").inc()
    of_store(registry).observe({f"{name}:x" if label else name: 1 for name, label in STORE.items()})
    labels = {}
    for metric in registry.collect():
        for sample in metric.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    return labels


@pytest.mark.parametrize("query", queries())
def test_query_asks_for_what_is_exported(query, exported):
    names = re.findall(r"vllm:\w+", query)
    assert names
    asked = set(re.findall(r"(\w+)=", query))
    for grouped in re.findall(r"by \(([^)]*)\)", query):
        asked |= set(grouped.split(", "))
    for name in names:
        if name.startswith((PREFIX, "vllm:cachegen_")):
            assert asked <= exported[name]
        else:
            assert f'"{name}"' in inspect.getsource(loggers)


def test_legends_name_labels_that_the_query_keeps():
    for panel in json.loads(BOARD.read_text())["panels"]:
        for target in panel["targets"]:
            kept = re.findall(r"by \(([^)]*)\)", target["expr"])
            for label in re.findall(r"{{(\w+)}}", target["legendFormat"]):
                assert not kept or all(label in one.split(", ") for one in kept)


def test_every_series_of_ours_is_on_the_dashboard(exported):
    asked = set(re.findall(r"vllm:\w+", " ".join(queries())))
    families = {re.sub(r"_(bucket|sum|count|created)$", "", name) for name in exported}
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for name in asked}
    totals = {name for name in families if name.endswith("_total")}
    gauges = {f"vllm:cachegen_{name}" for name in GAUGES}
    assert totals | gauges | {PREFIX + "compression_seconds", PREFIX + "kernels_info"} <= shown
