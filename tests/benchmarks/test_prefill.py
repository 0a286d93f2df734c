import pytest

from vllm_kvcompress.bench import prefill
from vllm_kvcompress.bench.crossover import Point
from vllm_kvcompress.bench.engine import MODEL, EngineSpec, Round
from vllm_kvcompress.bench.overhead import COMPRESSION, VLLM, Step, compression_over_rest
from vllm_kvcompress.bench.prefill import plot, stopped, table, verdicts
from vllm_kvcompress.bench.throughput import Grid
from vllm_kvcompress.bench.variants import OFF, PLAIN, variants

ROWS = variants([8], fp8=False)
SHORT, LONG = Point(1, 512), Point(1, 4096)


def grid(off_ms: float = 100, ours_ms: float = 105) -> Grid:
    def rounds(ms: float) -> list[Round]:
        return [Round(wall_s=ms / 1e3)] * 3

    at = {PLAIN: rounds(100), OFF: rounds(off_ms), "rate 8": rounds(ours_ms)}
    return Grid({SHORT: dict(at), LONG: dict(at)}, cache_blocks=400)


STEPS = [Step(512, 0, {VLLM: 0.1, COMPRESSION: 0.005})] * 3


def judge(measured: Grid) -> list[str]:
    return [verdict.what for verdict in verdicts(ROWS, measured) if not verdict.met]


def test_equal_builds_pass_and_slow_ones_are_caught():
    assert judge(grid()) == []
    assert judge(grid(off_ms=500)) == [
        "first token, off, 512 tokens",
        "first token, off, 4,096 tokens",
    ]
    assert judge(grid(ours_ms=500)) == ["first token, rate 8, 4,096 tokens"]


def test_compressing_five_times_as_slow_is_caught():
    assert judge(grid(ours_ms=100 + 5 * 5.5)) == ["first token, rate 8, 4,096 tokens"]


def test_a_row_per_length_and_variant_with_the_ratio_to_plain_last():
    shown = table(ROWS, grid(), {(512, "rate 8"): STEPS}, rounds=3)
    assert [row[:2] for row in shown.rows[:3]] == [["512", PLAIN], ["512", OFF], ["512", "rate 8"]]
    assert shown.rows[2][2:] == ["12.5%", "105.0", "5.00", "5.0%", "0.95"]
    assert shown.rows[5][4:6] == ["-", "-"]  # no stopwatches at that length
    refused = Grid({SHORT: {PLAIN: [Round(wall_s=1)]}}, {OFF: "no memory"}, cache_blocks=40)
    shown = table(ROWS, refused, {}, rounds=1)
    assert shown.rows[1][2] == "refused" and "off: no memory" in shown.note


def test_the_plot_is_a_picture(tmp_path):
    watched = {(n, "rate 8"): STEPS for n in (512, 4096)}
    plot(ROWS, grid(), watched, tmp_path / "p.png", "caption")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.engine
def test_stopwatches_see_compression_in_a_real_prefill():
    spec = EngineSpec(
        str(MODEL), cache_blocks=40, max_model_len=300, batched_tokens=128, max_seqs=4
    )
    seen = stopped(ROWS, [128, 288], spec, count=2, threads=1)
    assert set(seen) == {(128, "rate 8"), (288, "rate 8")}
    for (length, _), steps in seen.items():
        assert len(steps) == 2
        for step in steps:
            assert step.prompt_tokens == length
            assert 0 < compression_over_rest(step) < 10
            assert step.seconds[COMPRESSION] < sum(step.seconds.values())


def test_an_engine_that_does_not_start_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(prefill, "STOPWATCHES", ("sh", "-c", "echo 'ValueError: no' >&2; exit 1"))
    spec = EngineSpec(str(MODEL), cache_blocks=40)
    with pytest.raises(SystemExit, match="the engine under stopwatches has ended: no"):
        stopped(ROWS, [128], spec, count=1, threads=1)
