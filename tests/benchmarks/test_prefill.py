import json

import pytest
from typer.testing import CliRunner

from vllm_kvcompress.bench import prefill
from vllm_kvcompress.bench.cli import app
from vllm_kvcompress.bench.crossover import Point
from vllm_kvcompress.bench.engine import MODEL, EngineSpec, Round
from vllm_kvcompress.bench.errors import BenchError
from vllm_kvcompress.bench.flops import Cost, Decoder, Flops, Prediction, timed
from vllm_kvcompress.bench.overhead import COMPRESSION, VLLM, Step
from vllm_kvcompress.bench.prefill import plot, stopped, table, verdicts
from vllm_kvcompress.bench.throughput import Grid
from vllm_kvcompress.bench.variants import OFF, PLAIN, variants

ROWS = variants([8], fp8=False)
PROPAGATING = variants([10, 5], ["fastkv", "tsp"], fp8=False, off=False)
LLAMA = Decoder.llama(layers=8, hidden=512)
SMALL = Decoder(layers=2, hidden=4, intermediate=8, heads=2, kv_heads=1, head_size=2, vocabulary=10)
SHORT, LONG = Point(1, 512), Point(1, 4096)


def grid(off_ms: float = 100, ours_ms: float = 105) -> Grid:
    def rounds(ms: float) -> list[Round]:
        return [Round(wall_s=ms / 1e3)] * 3

    at = {PLAIN: rounds(100), OFF: rounds(off_ms), "rate 8": rounds(ours_ms)}
    return Grid({SHORT: dict(at), LONG: dict(at)}, cache_blocks=400)


STEPS = [Step(512, 0, {VLLM: 0.1, COMPRESSION: 0.005})] * 3


def judge(measured: Grid) -> list[str]:
    return [verdict.what for verdict in verdicts(ROWS, measured, None) if not verdict.met]


def test_equal_builds_pass_and_slow_ones_are_caught():
    assert judge(grid()) == []
    assert judge(grid(off_ms=500)) == [
        "first token, off, 512 tokens",
        "first token, off, 4,096 tokens",
    ]
    assert judge(grid(ours_ms=500)) == ["first token, rate 8, 4,096 tokens"]


def test_flops_of_a_prefill_worked_out_by_hand():
    # A token and layer: 4 x (4 + 2 + 2) + 4 x 4 of projections, 3 x 4 x 8 of MLP: 144 products.
    # Attention: 6 pairs of 3 tokens, 2 heads of 2, keys and values. The head: 4 x 10.
    assert SMALL.prefill(3) == Flops(2 * 2 * 144 * 3 + 2 * 40, 2 * 2 * 2 * 4 * 6)
    one_goes_on = Flops(2 * 144 * 3 + 2 * 144 + 2 * 40, 2 * 2 * 4 * 6 + 2 * 2 * 4)
    assert SMALL.prefill(3, selected=1, last_full=0) == one_goes_on
    assert SMALL.prefill(3, selected=1, last_full=1) == SMALL.prefill(3)


def test_the_parameters_counted_are_those_of_the_model():
    """Two operations a token for each weight that is not an embedding's or a norm's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=100, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    layers = LlamaForCausalLM(config).model.layers
    weights = sum(p.numel() for p in layers.parameters() if p.dim() == 2)
    counted = Decoder.of(config)
    assert counted is not None
    assert counted.prefill(7).linear == 2 * (7 * weights + 64 * 100)


def test_half_the_layers_on_a_fifth_is_between_the_two_limits():
    """1 / (1/2 + 1/2 x 0.2) where all is linear, 1 / (1/2 + 1/2 x 0.04) where all is attention."""
    row, prediction = PROPAGATING[-1], Prediction(LLAMA)
    assert row.name == "tsp"
    assert 1.6 < prediction.speed_up(row, 1024) < prediction.speed_up(row, 4096) < 1.8
    assert prediction.speed_up(row, 4_096_000) == pytest.approx(1 / 0.52, rel=2e-3)
    assert Prediction(LLAMA, Cost(1, 2)).timed_speed_up(row, 4096) == pytest.approx(
        prediction.speed_up(row, 2 * 4096), rel=1e-2
    ), "attention that is twice as dear weighs as much as at twice the length"
    assert prediction.timed_speed_up(row, 4096) is None


def test_costs_are_told_from_times_that_they_explain():
    cost = Cost(2e-12, 5e-12)
    found = timed({f: cost.of(f) for f in (LLAMA.prefill(n) for n in (512, 2048, 4096))})
    assert found is not None
    assert (found.linear, found.attention) == pytest.approx((2e-12, 5e-12))
    assert timed({LLAMA.prefill(512): 1.0}) is None
    assert timed({LLAMA.prefill(512): 1.0, LLAMA.prefill(4096): 2.0}) is None  # less than linear


def test_propagated_prompts_are_judged_by_their_flops_where_computing_binds():
    def missed(tokens, **seconds):
        at = {PLAIN: 10.0, "tsp": 5.5, "fastkv 5": 5.6, "fastkv 10": 5.7, **seconds}
        point = Point(1, tokens)
        one = Grid({point: {name: [Round(wall_s=s)] for name, s in at.items()}}, cache_blocks=400)
        judged = verdicts(PROPAGATING, one, Prediction(LLAMA))
        return len(judged), [verdict.what for verdict in judged if not verdict.met]

    assert missed(4096) == (5, [])
    assert missed(4096, tsp=9.0) == (
        5,
        ["first token, tsp, 4,096 tokens", "first token, tsp as soon as fastkv 5, 4,096 tokens"],
    )
    assert missed(1024) == (2, [])


def test_compressing_five_times_as_slow_is_caught():
    assert judge(grid(ours_ms=100 + 5 * 5.5)) == ["first token, rate 8, 4,096 tokens"]


def test_a_row_per_length_and_variant_with_the_ratio_to_plain_last():
    shown = table(ROWS, grid(), {(512, "rate 8"): STEPS}, None, rounds=3)
    assert [row[:2] for row in shown.rows[:3]] == [["512", PLAIN], ["512", OFF], ["512", "rate 8"]]
    assert shown.rows[2][2:] == ["12.5%", "105.0", "5.00 (5.0%)", "0.95", "-", "-"]
    assert shown.rows[5][4] == "-"  # no stopwatches at that length
    refused = Grid({SHORT: {PLAIN: [Round(wall_s=1)]}}, {OFF: "no memory"}, cache_blocks=40)
    shown = table(ROWS, refused, {}, None, rounds=1)
    assert shown.rows[1][2] == "refused" and "off: no memory" in shown.note


def test_the_plot_is_a_picture(tmp_path):
    plot(ROWS, grid(), Prediction(LLAMA), tmp_path / "p.png", "caption")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.engine
def test_a_small_run_prints_and_writes_all_of_it(tmp_path):
    report = tmp_path / "prefill.json"
    command = "--prompt-tokens 64 256 --rounds 1 --stopwatches 2 --layers 2 --hidden 64 --rates 4"
    asked = [*command.split(), "--batched-tokens", "128", "--presets", "fastkv", "--no-off"]
    done = CliRunner().invoke(prefill.app, [*asked, "--threads", "1", "--json", str(report)])
    assert isinstance(done.exception, SystemExit | None), done.output  # it judges times
    assert "verdicts met" in done.output and report.with_suffix(".png").exists()
    written = json.loads(report.read_text())
    for point in written["points"]:
        ((row, prefills),) = point["stopwatches"].items()
        assert row == "fastkv 4" and len(prefills) == 2
        for seconds in prefills:
            assert seconds["propagation"] > 0
            assert 0 < seconds[COMPRESSION] < sum(seconds.values())
    (table,) = written["tables"]
    assert table["rows"][-1][-2].startswith("1.6")  # half the layers on a quarter of the tokens


def test_an_engine_that_does_not_start_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(prefill, "STOPWATCHES", ("sh", "-c", "echo 'ValueError: no' >&2; exit 1"))
    spec = EngineSpec(str(MODEL), cache_blocks=40)
    with pytest.raises(BenchError, match="the engine under stopwatches has ended: no"):
        stopped(ROWS, [128], spec, count=1, threads=1)


@pytest.mark.parametrize("command", ["prefill", "reuse", "stream"])
def test_a_model_of_another_width_is_refused_in_one_line(command):
    done = CliRunner().invoke(app, [command, "--hidden", "100"])
    assert done.exit_code == 2
    assert "100 is no multiple of 64" in done.output
