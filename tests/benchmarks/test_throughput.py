from dataclasses import replace

import pytest

from vllm_kvcompress.bench.engine import Round, Workload
from vllm_kvcompress.bench.throughput import CONTINUAL, OFF, PLAIN, ratio, table, targets, variants

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


def faster(times: float, decode_times: float | None = None) -> Round:
    decode_times = decode_times or times
    return replace(
        PLAIN_ROUND,
        wall_s=PLAIN_ROUND.wall_s / times,
        cpu_s=PLAIN_ROUND.cpu_s / times,
        decode_s=PLAIN_ROUND.decode_s / decode_times,
        decode_cpu_s=PLAIN_ROUND.decode_cpu_s / decode_times,
    )


@pytest.fixture
def samples() -> dict[str, list[Round]]:
    """Five rounds in which every target is met."""
    times = {PLAIN: (1, 1), "flag off": (1, 1), OFF: (0.99, 0.99), "rate 8": (2, 3.5)}
    times[CONTINUAL] = (2.4, 5)
    return {name: [faster(*pair)] * 5 for name, pair in times.items()}


def test_rates_count_what_they_say():
    assert PLAIN_ROUND.total_per_s == 2000
    assert PLAIN_ROUND.decode_per_s == 500
    assert PLAIN_ROUND.mean_running == 4


def test_targets_are_met_where_they_are(samples):
    assert [verdict.met for verdict in targets(samples)] == [True] * 5


@pytest.mark.parametrize("name", ["flag off", OFF, "rate 8", CONTINUAL])
def test_a_variant_slowed_fivefold_is_flagged(samples, name):
    samples[name] = [
        replace(r, wall_s=5 * r.wall_s, decode_s=5 * r.decode_s) for r in samples[name]
    ]
    missed = [verdict for verdict in targets(samples) if not verdict.met]
    assert missed and all(verdict.what.startswith(name) for verdict in missed)
    assert ratio(samples, name, "total").median < 0.5


def test_one_slow_round_of_five_does_not_flag(samples):
    samples["rate 8"][2] = faster(0.4)
    assert all(verdict.met for verdict in targets(samples))
    assert ratio(samples, "rate 8", "total").low == pytest.approx(0.4)


def test_targets_of_variants_that_did_not_run_are_not_judged(samples):
    only = {name: samples[name] for name in (PLAIN, OFF)}
    assert [verdict.what.split(",")[0] for verdict in targets(only)] == [OFF]


def test_every_variant_is_a_row(samples):
    rows = [row for row in variants([8]) if row.name in samples]
    assert table(rows, samples, "decode").row_count == len(samples) == 5


def test_rate_1_goes_through_an_arena():
    (forced,) = [row for row in variants([1, 8]) if row.rate == 1]
    assert forced.kv_compress == {"rate": 1, "test_force_arena": True}


def test_plain_vllm_does_not_load_the_plugin():
    assert [row.name for row in variants([8]) if not row.plugin] == [PLAIN]


def test_engines_with_the_same_seed_get_the_same_prompts():
    work = Workload(prompts=3, prompt_tokens=50, output_tokens=1, seed=7)
    assert work.token_ids(500) == work.token_ids(500)
    assert work.token_ids(500) != replace(work, seed=8).token_ids(500)
    assert [len(ids) for ids in work.token_ids(500)] == [50] * 3
