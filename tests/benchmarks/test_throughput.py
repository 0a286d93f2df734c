import json
import random
from dataclasses import replace

import pytest
import typer
from typer.testing import CliRunner

from vllm_kvcompress.bench import promises, throughput
from vllm_kvcompress.bench.crossover import Point
from vllm_kvcompress.bench.engine import EngineSpec, Round, Workload
from vllm_kvcompress.bench.errors import BenchError
from vllm_kvcompress.bench.process import ProcessEnded, last_words
from vllm_kvcompress.bench.promises import ratio, read_baseline, verdicts
from vllm_kvcompress.bench.throughput import Grid, measure, table
from vllm_kvcompress.bench.variants import FP8, OFF, PLAIN, variants

CROWDED, ROOMY = Point(16, 2048), Point(2, 256)
ROWS = variants([2, 8], flag_off=True)
OURS = ["flag off", OFF, "rate 2", "rate 8"]

PLAIN_ROUND = Round(
    wall_s=20.0,
    cpu_s=20.0,
    decode_s=16.0,
    decode_cpu_s=16.0,
    decode_steps=2000,
    decode_tokens=8000,
    prompt_tokens=32_000,
    output_tokens=8_000,
)


def faster(total: float, decode: float, base: Round = PLAIN_ROUND) -> Round:
    return replace(
        base,
        wall_s=base.wall_s / total,
        cpu_s=base.cpu_s / total,
        decode_s=base.decode_s / decode,
        decode_cpu_s=base.decode_cpu_s / decode,
    )


def grid(seed: int = 0, slowed: dict[str, float] | None = None) -> promises.Samples:
    """Five rounds of every row at both points, each a few percent off, some rows slowed."""
    rng = random.Random(seed)
    truth = {
        CROWDED: {PLAIN: (1, 1), "rate 2": (1.4, 1.7), "rate 8": (2.1, 2.9)},
        ROOMY: {PLAIN: (1, 1), "rate 2": (0.9, 0.92), "rate 8": (0.95, 1.05)},
    }

    def noisy(times: float, name: str) -> float:
        return times * rng.uniform(0.97, 1.03) / (slowed or {}).get(name, 1)

    return {
        point: {
            name: [faster(*(noisy(x, name) for x in times.get(name, (1, 1)))) for _ in range(5)]
            for name in [PLAIN, *OURS]
        }
        for point, times in truth.items()
    }


def judge(samples: promises.Samples, baseline: promises.Baseline | None = None) -> list[str]:
    """What is missed."""
    found = verdicts(samples, ROWS, lambda point: point == CROWDED, baseline)
    return [verdict.what for verdict in found if not verdict.met]


def ratios_of(samples: promises.Samples) -> promises.Baseline:
    return {
        (point, name, figure): ratio(rounds, name, figure).median
        for point, rounds in samples.items()
        for name in rounds
        for figure in promises.WORDS
    }


def test_rates_count_what_they_say():
    assert PLAIN_ROUND.total_per_s == 2000
    assert PLAIN_ROUND.decode_per_s == 500
    assert PLAIN_ROUND.mean_running == 4


@pytest.mark.parametrize("seed", range(20))
def test_equal_builds_pass(seed):
    assert judge(grid(seed)) == []
    assert judge(grid(seed), ratios_of(grid(seed + 1000))) == []


@pytest.mark.parametrize("name", OURS)
def test_a_row_slowed_fivefold_is_caught(name):
    missed = judge(grid(slowed={name: 5}))
    assert missed and all(what.startswith(name) for what in missed)


def test_a_build_slowed_fivefold_is_caught_at_every_point():
    missed = judge(grid(slowed=dict.fromkeys(OURS, 5)))
    for name in OURS:
        for point in (CROWDED, ROOMY):
            assert any(what.startswith(f"{name}, {point.text()}") for what in missed)


def test_a_build_that_was_fast_enough_to_hide_it_is_caught_against_its_baseline():
    fast = {CROWDED: {PLAIN: [PLAIN_ROUND] * 3, "rate 8": [faster(8, 12)] * 3}}
    slow = {CROWDED: {PLAIN: [PLAIN_ROUND] * 3, "rate 8": [faster(8 / 5, 12 / 5)] * 3}}
    assert judge(slow) == []
    assert len(judge(slow, ratios_of(fast))) == 2
    assert judge(fast, ratios_of(fast)) == []


def test_one_slow_round_of_five_is_not_judged():
    samples = grid()
    samples[CROWDED]["rate 8"][2] = faster(0.2, 0.2)
    assert judge(samples) == []


def test_compression_need_not_pay_where_everything_fits():
    samples = grid()
    samples[ROOMY]["rate 8"] = [faster(0.8, 0.8)] * 5
    assert judge(samples) == []
    samples[CROWDED]["rate 8"] = [faster(0.8, 0.8)] * 5
    assert judge(samples) == [f"rate 8, {CROWDED.text()}, decode tokens/s"]


def test_points_without_decode_steps_are_judged_in_all_only():
    instant = replace(PLAIN_ROUND, decode_tokens=0, decode_s=0.0, decode_steps=0)
    samples = {CROWDED: {name: [instant] * 3 for name in [PLAIN, *OURS]}}
    assert judge(samples) == []


def test_every_point_has_plain_vllm_first_and_refused_rows_in_words():
    measured = Grid(dict(grid()), {FP8: "FP8 needs AVX-512"}, cache_blocks=320, cache_bytes=2**20)
    shown = table(CROWDED, ROWS, measured, output_tokens=512, rounds=5)
    assert [row[0] for row in shown.rows] == [PLAIN, FP8, *OURS]
    assert shown.rows[0][-1] == "1.00"
    assert shown.rows[1][1:] == ["refused", *["-"] * 6]
    assert "fp8 cache: FP8 needs AVX-512" in shown.note
    held = {row[0]: row[1] for row in shown.rows}
    assert held["rate 8"] == "12.5%" and held[OFF] == "100.0%"  # 8 of 64 blocks


class Scripted:
    """Answers rounds as told; one that is told to die does, at its n-th round."""

    def __init__(self, calls: list[tuple[str, int, object]], name: str, dies_at: int = 99) -> None:
        self.calls, self.name, self.left = calls, name, dies_at

    def run(self, work: Workload) -> Round:
        self.left -= 1
        if self.left == 0:
            raise ProcessEnded(self.name, "MemoryError: no room")
        self.calls.append((self.name, work.seed, work.extra_args))
        return PLAIN_ROUND


def test_rows_take_turns_in_rotating_order_on_the_same_prompts():
    calls: list = []
    rows = variants([8], fp8=False)
    children = {row.name: Scripted(calls, row.name) for row in rows}
    samples = throughput._rounds(rows, children, Workload(1, 1, 1), 2, {}, lambda _: None)
    assert {name: len(rounds) for name, rounds in samples.items()} == {row.name: 2 for row in rows}
    names, seeds = [name for name, _, _ in calls], [seed for _, seed, _ in calls]
    assert seeds == [-1] * 3 + [0] * 3 + [1] * 3  # the first round warms up
    assert names[3:] == [PLAIN, OFF, "rate 8", OFF, "rate 8", PLAIN]
    asked = {name: args for name, _, args in calls}
    assert asked[PLAIN] is None and asked[OFF] == {"kv_compress": "off"}


def test_an_engine_that_dies_loses_its_row_and_without_plain_vllm_all_ends():
    rows, refused = variants([8], fp8=False), {}
    children = {row.name: Scripted([], row.name) for row in rows}
    children["rate 8"] = Scripted([], "rate 8", dies_at=2)
    samples = throughput._rounds(rows, children, Workload(1, 1, 1), 2, refused, lambda _: None)
    assert set(samples) == {PLAIN, OFF} and refused == {"rate 8": "no room"}
    children[PLAIN] = Scripted([], PLAIN, dies_at=2)
    with pytest.raises(BenchError, match="plain vLLM died: no room"):
        throughput._rounds(rows, children, Workload(1, 1, 1), 2, {}, lambda _: None)


def test_the_last_exception_is_why_an_engine_ended():
    log = [
        "INFO starting",
        "[rank0]: NotImplementedError: FP8 KV cache on CPU requires x86 with AVX-512 or AMX.",
        "[rank0]: Traceback",
        "bye",
    ]
    assert last_words(log) == "FP8 KV cache on CPU requires x86 with AVX-512 or AMX."
    assert last_words(["only this"]) == "only this"
    invalid = [
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig",
        "  Value error, max_model_len is too large [type=value_error, input_value=1]",
        "    For further information visit a page",
    ]
    assert last_words(invalid) == "max_model_len is too large"


def test_plain_vllm_and_fp8_do_not_load_the_plugin():
    assert [row.name for row in ROWS if not row.engine.plugin] == [PLAIN, FP8]


def test_all_rates_share_one_engine_except_the_forced_one():
    rows = variants([1, 2, 8], ["kv-compress", "snapkv"], off=True)
    engines = {row.name: row.engine for row in rows}
    assert engines["rate 2"] == engines["rate 8"] == engines["snapkv 8"] == engines[OFF]
    assert engines["rate 1"].kv_compress == {"rate": 1, "test_force_arena": True}


@pytest.mark.parametrize(
    ("options", "complaint"),
    [(["--presets", "snap"], "no preset"), (["--rates", "0.5"], "not between"),
     (["--against", "nowhere.json"], "cannot read"),
     (["--prompts", "0"], "input should be greater")],
)  # fmt: skip
def test_bad_options_are_one_clear_line(options, complaint):
    done = CliRunner().invoke(throughput.app, options)
    assert done.exit_code == 2
    assert complaint.lower() in " ".join(done.output.lower().split())


def test_a_baseline_is_an_earlier_report(tmp_path):
    path = tmp_path / "earlier.json"
    row = {"ratio_to_plain": {"total": {"median": 2.0}, "decode": {"median": 3.0}}}
    at = {"prompts": 16, "prompt_tokens": 2048, "rows": {"rate 8": row}}
    path.write_text(json.dumps({"points": [at]}))
    assert read_baseline(path) == {
        (CROWDED, "rate 8", "total"): 2.0,
        (CROWDED, "rate 8", "decode"): 3.0,
    }
    for nothing in ("[]", "[" * 100_000):
        path.write_text(nothing)
        with pytest.raises(typer.BadParameter, match="no report of bench throughput"):
            read_baseline(path)
    path.write_bytes(b"\xff")
    with pytest.raises(typer.BadParameter, match="it is not text"):
        read_baseline(path)


def test_engines_with_the_same_seed_get_the_same_prompts():
    work = Workload(prompts=3, prompt_tokens=50, output_tokens=1, seed=7)
    assert work.token_ids(500) == work.token_ids(500)
    assert work.token_ids(500) != replace(work, seed=8).token_ids(500)
    assert [len(ids) for ids in work.token_ids(500)] == [50] * 3


SLOW_BUILD = """
import time
from vllm_kvcompress.bench import child

open_engine = child.open_engine


def slow_engine(spec):
    llm = open_engine(spec)
    step = llm.llm_engine.step

    def slow_step():
        began = time.perf_counter()
        try:
            return step()
        finally:
            time.sleep(4 * (time.perf_counter() - began))

    if spec.kv_compress is not None:
        llm.llm_engine.step = slow_step
    return llm


child.open_engine = slow_engine
child.main()
"""


@pytest.mark.engine
def test_a_real_engine_slowed_fivefold_is_caught(tmp_path, monkeypatch):
    import sys

    slow = tmp_path / "slow_build.py"
    slow.write_text(SLOW_BUILD)
    rows = variants([8], fp8=True)
    spec = EngineSpec(
        model=str(throughput.MODEL), cache_blocks=24, max_model_len=160, eager=True, max_seqs=8
    )
    point = Point(3, 128)
    done = measure(
        rows,
        [point],
        spec,
        Workload(0, 0, 16),
        rounds=2,
        threads=1,
        command=(sys.executable, str(slow)),
    )
    missed = [v.what for v in verdicts(done.samples, rows, lambda _: False) if not v.met]
    assert {what.split(",")[0] for what in missed} == {OFF, "rate 8"}
    pairs = zip(done.samples[point][OFF], done.samples[point][PLAIN], strict=True)
    assert all(ours.digest == theirs.digest for ours, theirs in pairs)
    assert all(r.prompt_tokens == 3 * 128 for r in done.samples[point][PLAIN])
    assert done.cache_bytes == 24 * 32 * 4 * 4 * 2 * 32 * 4  # blocks, B, L, H, K and V, D, float32
    if FP8 in done.refused:
        assert "FP8" in done.refused[FP8]
