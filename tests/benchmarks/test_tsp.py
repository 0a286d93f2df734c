"""What FLOPs say about token-selective propagation, against numbers worked out by hand."""

import json

import pytest
from typer.testing import CliRunner

from vllm_kvcompress.bench import tsp
from vllm_kvcompress.bench.crossover import Point
from vllm_kvcompress.bench.engine import Round
from vllm_kvcompress.bench.throughput import Grid
from vllm_kvcompress.bench.tsp import Shape, predicted, rows_of, verdicts

SMALL = Shape(layers=2, hidden=4, intermediate=8, heads=2, kv_heads=1, head_size=2, vocabulary=10)


def test_flops_of_a_prefill_worked_out_by_hand() -> None:
    # A token and layer: 4 x (4 + 2 + 2) + 4 x 4 of projections, 3 x 4 x 8 of MLP: 144 products.
    # Attention: 6 pairs of 3 tokens, 2 heads of 2, keys and values. The head: 4 x 10.
    assert SMALL.prefill_flops(3) == 2 * (2 * 144 * 3 + 2 * 2 * 4 * 6) + 2 * 40
    one_goes_on = (2 * 144 * 3 + 2 * 2 * 4 * 6) + (2 * 144 + 2 * 2 * 4) + 2 * 40
    assert SMALL.prefill_flops(3, selected=1, last_full=0) == one_goes_on
    assert SMALL.prefill_flops(3, selected=1, last_full=1) == SMALL.prefill_flops(3)


def test_half_the_layers_on_a_fifth_is_between_the_two_limits() -> None:
    """1 / (1/2 + 1/2 x 0.2) where all is linear, 1 / (1/2 + 1/2 x 0.04) where all is attention."""
    row = rows_of([0.2], [])[1]
    short, long = predicted(Shape(), row, 4096), predicted(Shape(), row, 4_096_000)
    assert 1.6 < short < 1.78 and long == pytest.approx(1 / 0.52, rel=2e-3)


def grid_of(seconds: dict[str, float], tokens: int) -> Grid:
    point = Point(1, tokens)
    return Grid({point: {name: [Round(wall_s=s)] for name, s in seconds.items()}})


def test_short_prompts_are_not_judged_and_slow_ones_are_missed() -> None:
    rows = rows_of([0.2], [10, 5])
    at_speed = {"plain vLLM": 10.0, "tsp 0.2": 5.5, "fastkv 10": 5.6, "fastkv 5": 5.7}
    assert verdicts(Shape(), rows, grid_of(at_speed, 1024)) == []
    judged = verdicts(Shape(), rows, grid_of(at_speed, 4096))
    assert len(judged) == 4 and all(verdict.met for verdict in judged)
    slow = {**at_speed, "tsp 0.2": 9.0, "fastkv 5": 6.5}
    missed = [v.what for v in verdicts(Shape(), rows, grid_of(slow, 4096)) if not v.met]
    assert len(missed) == 3 and missed[0].startswith("first token, tsp 0.2")


@pytest.mark.engine
def test_a_small_run_prints_and_writes_both_numbers(tmp_path) -> None:
    report = tmp_path / "tsp.json"
    command = "--prompt-tokens 256 --rounds 1 --layers 2 --hidden 64 --rates 4 --threads 1 --json"
    done = CliRunner().invoke(tsp.app, [*command.split(), str(report)])
    assert done.exit_code == 0, done.output
    assert "FLOPs say" in done.output and report.with_suffix(".png").exists()
    (point,) = json.loads(report.read_text())["points"]
    assert set(point["first_token_s"]) == {"plain vLLM", "tsp 0.2", "fastkv 4"}
    assert 1 < point["predicted"]["tsp 0.2"] < 2
