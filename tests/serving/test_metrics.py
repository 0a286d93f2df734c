"""What a snapshot says is what Prometheus and the JSON show, whichever process it reached."""

import json
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

import pytest
from prometheus_client import REGISTRY, CollectorRegistry
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.metrics.loggers import StatLoggerManager
from vllm.v1.metrics.stats import SchedulerStats

from vllm_kvcompress.accounting import Settings, plan
from vllm_kvcompress.engine.stats import RequestRecord, Totals, WorkerStats
from vllm_kvcompress.plugin import register
from vllm_kvcompress.serving.metrics import (
    PREFIX,
    KVCompressStatLogger,
    Series,
    refusals_counter,
    take_payload,
)
from vllm_kvcompress.serving.snapshots import Snapshots

MODEL = "vllm_kvcompress/demo_model"
FIRST = {
    "requests": [["snapkv", "compressed", 2], ["off", "off", 1]],
    "prompt_tokens": {"snapkv": 300},
    "held_tokens": {"snapkv": 100},
    "recompressions": 0,
    "blocks_freed": 10,
    "pages_freed": 160,
    "before": {},
    "number": 1,
    "seconds": [0.004, 0.2],
    "kernels": {"attention": ["cuda", "triton"], "compaction": ["cuda"]},
    "recent": [{"request_id": "a"}],
}
SECOND = {
    "requests": [["snapkv", "compressed", 5], ["off", "off", 1], ["snapkv", "aborted", 1]],
    "prompt_tokens": {"snapkv": 900, "adakv": 40},
    "held_tokens": {"snapkv": 250, "adakv": 8},
    "recompressions": 3,
    "blocks_freed": 25,
    "pages_freed": 400,
    "before": {key: FIRST[key] for key in list(FIRST)[:6]},
    "number": 2,
    "seconds": [3.0],
    "kernels": {"attention": ["cuda", "triton"], "compaction": ["cuda"]},
    "recent": [{"request_id": "a"}, {"request_id": "b"}],
}


def value(registry, name, **labels) -> float:
    return registry.get_sample_value(PREFIX + name, {"model_name": "m", "engine": "0"} | labels)


def check_totals_after_second(read) -> None:
    assert read("requests_total", policy="snapkv", outcome="compressed") == 5
    assert read("requests_total", policy="snapkv", outcome="aborted") == 1
    assert read("requests_total", policy="off", outcome="off") == 1
    assert read("prompt_tokens_total", policy="snapkv") == 900
    assert read("held_tokens_total", policy="adakv") == 8
    assert read("recompressions_total") == 3
    assert read("blocks_freed_total") == 25
    assert read("pages_freed_total") == 400
    assert read("kernels_info", attention="cuda+triton", compaction="cuda") >= 1
    assert read("compression_seconds_count") == 3
    assert read("compression_seconds_sum") == pytest.approx(3.204)


def test_series_add_up_to_the_counters() -> None:
    registry = CollectorRegistry()
    series = Series("m", registry)
    series.show(0)
    assert value(registry, "blocks_freed_total") == 0
    series.add(0, FIRST)
    assert value(registry, "requests_total", policy="snapkv", outcome="compressed") == 2
    series.add(0, SECOND)
    check_totals_after_second(lambda name, **labels: value(registry, name, **labels))
    assert value(registry, "compression_seconds_bucket", le="0.005") == 1
    assert value(registry, "compression_seconds_bucket", le="2.5") == 2


def test_processes_that_share_the_snapshots_add_up_together() -> None:
    registries = CollectorRegistry(), CollectorRegistry()
    for registry, payload in zip(registries, (FIRST, SECOND), strict=True):
        Series("m", registry).add(0, payload)

    def summed(name, **labels) -> float:
        return sum(value(registry, name, **labels) or 0 for registry in registries)

    check_totals_after_second(summed)


def test_engines_have_series_of_their_own() -> None:
    registry = CollectorRegistry()
    series = Series("m", registry)
    series.add(0, FIRST)
    series.add(1, SECOND | {"before": {}})
    assert value(registry, "blocks_freed_total") == 10
    assert value(registry, "blocks_freed_total", engine="1") == 25


def test_the_refusal_counter_is_one_per_registry() -> None:
    registry = CollectorRegistry()
    assert refusals_counter(registry) is refusals_counter(registry)


def test_our_part_is_taken_out_before_vllm_looks() -> None:
    assert take_payload(None) is None
    stats = SchedulerStats(kv_connector_stats={"kv_compress": FIRST})
    assert take_payload(stats) is FIRST and stats.kv_connector_stats is None
    stats = SchedulerStats(kv_connector_stats={"kv_compress": FIRST, "bytes": 1})
    assert take_payload(stats) is FIRST and stats.kv_connector_stats == {"bytes": 1}
    stats = SchedulerStats(kv_connector_stats={"bytes": 1})
    assert take_payload(stats) is None and stats.kv_connector_stats == {"bytes": 1}


def test_beside_vllms_own_loggers() -> None:
    register()
    args = EngineArgs(model=MODEL, max_model_len=4096, enforce_eager=True, served_model_name="m")
    args.additional_config = {"kv_compress": True}
    manager = StatLoggerManager(args.create_engine_config())
    assert isinstance(manager.stat_loggers[0], KVCompressStatLogger)
    manager.log_engine_initialized()
    for payload in (FIRST, SECOND):
        stats = SchedulerStats(kv_connector_stats={"kv_compress": deepcopy(payload)})
        manager.record(stats, None)
    check_totals_after_second(lambda name, **labels: value(REGISTRY, name, **labels))
    assert REGISTRY.get_sample_value(
        "vllm:num_requests_running", {"model_name": "m", "engine": "0"}
    ) == 0  # fmt: skip
    assert manager.stat_loggers[0].snapshots.summed()["blocks_freed"] == 25

    args.additional_config = {}
    plain = StatLoggerManager(args.create_engine_config())
    assert not any(isinstance(one, KVCompressStatLogger) for one in plain.stat_loggers)


def test_the_sum_over_engines() -> None:
    snapshots = Snapshots()
    snapshots.put(0, FIRST)
    snapshots.put(1, FIRST | {"kernels": {"attention": ["cpu"], "compaction": ["cuda"]}})
    snapshots.put(0, SECOND)
    assert json.loads(json.dumps(snapshots.summed())) == {
        "requests": {"snapkv": {"compressed": 7, "aborted": 1}, "off": {"off": 2}},
        "prompt_tokens": {"snapkv": 1200, "adakv": 40},
        "held_tokens": {"snapkv": 350, "adakv": 8},
        "recompressions": 3,
        "blocks_freed": 35,
        "pages_freed": 560,
        "kernels": {"attention": ["cpu", "cuda", "triton"], "compaction": ["cuda"]},
        "recent": [
            {"request_id": "a", "engine": 0},
            {"request_id": "b", "engine": 0},
            {"request_id": "a", "engine": 1},
        ],
    }
    assert Snapshots().summed()["requests"] == {}


def test_processes_see_each_others_snapshots(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    one, other = Snapshots(), Snapshots()
    one.put(0, SECOND)
    monkeypatch.setattr("os.getpid", lambda: 7)
    other.put(0, FIRST)
    assert one.summed() == other.summed()
    assert other.summed()["blocks_freed"] == 25


def test_the_page_names_every_series_and_every_field() -> None:
    page = Path("docs/verification.md").read_text()
    registry = CollectorRegistry()
    series = Series("m", registry)
    series.add(0, FIRST)
    refusals_counter(registry)
    for metric in registry.collect():
        assert f"`{metric.name}" in page
    record = RequestRecord.of("r", plan(320, 32, 1000, Settings("snapkv")), Settings("snapkv"), 320)
    for name in {*Snapshots().summed(), *asdict(record)}:
        assert f"`{name}`" in page


def test_every_snapshot_brings_the_one_before() -> None:
    settings = Settings("snapkv", rate=4)
    totals = Totals(pages_per_block=16)
    registry = CollectorRegistry()
    series = Series("m", registry)
    for n in (320, 640):
        what = plan(n, 32, 1000, settings)
        totals.compressed(RequestRecord.of(f"r{n}", what, settings, n))
        totals.ended(f"r{n}", what, settings, aborted=False)
        totals.add(WorkerStats.of([0.01], {"attention": ["cpu"], "compaction": ["cpu"]}))
        series.add(0, totals.snapshot())
    assert not totals.changed()
    assert value(registry, "prompt_tokens_total", policy="snapkv") == 960
    assert value(registry, "held_tokens_total", policy="snapkv") == (3 + 5) * 32
    assert value(registry, "requests_total", policy="snapkv", outcome="compressed") == 2
    assert value(registry, "compression_seconds_count") == 2
    assert value(registry, "kernels_info", attention="cpu", compaction="cpu") == 1
