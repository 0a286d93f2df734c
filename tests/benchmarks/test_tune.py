"""`vllm-kvcompress tune`: what is tried, how overlap is counted, and what is advised."""

import json
from pathlib import Path
from random import Random

import pytest
import torch
from typer.testing import CliRunner

import vllm_kvcompress
from vllm_kvcompress.bench.demo_model.language import needle_task
from vllm_kvcompress.bench.parity.methods import FastKV
from vllm_kvcompress.bench.quality.encode import LocalEncoder
from vllm_kvcompress.bench.quality.judge import Pairing
from vllm_kvcompress.bench.quality.rows import Cell, Group, Row
from vllm_kvcompress.bench.tune.reading import Reader
from vllm_kvcompress.bench.tune.show import Tried, advised, tried
from vllm_kvcompress.bench.tune.sweeps import (
    Candidate,
    GroupLayersSweep,
    TspLayerSweep,
    overlaps,
)
from vllm_kvcompress.cli import app
from vllm_kvcompress.presets import shipped_presets

MODEL = str(Path(vllm_kvcompress.__file__).parent / "demo_model")
FASTKV = shipped_presets()["fastkv"]
WINDOWKV = shipped_presets()["windowkv"].for_task("localization")
GROUP = Group("needle", 1024, False)


def test_overlap_is_the_share_of_the_one_that_the_other_has_too() -> None:
    chosen = torch.zeros(3, 2, 6, dtype=torch.bool)  # 3 layers, 2 heads
    sets = [[{0, 1}, {0, 1}], [{1, 2}, {0, 1}], [{4, 5, 1}, {5}]]
    for layer, heads in enumerate(sets):
        for head, positions in enumerate(heads):
            chosen[layer, head, list(positions)] = True
    found = overlaps(list(chosen))
    for a in range(3):
        for b in range(3):
            shares = [len(sets[a][h] & sets[b][h]) / len(sets[b][h]) for h in range(2)]
            assert found[a, b] == pytest.approx(sum(shares) / 2)


def test_layers_tried_are_spread_and_have_the_published_one() -> None:
    sweep = TspLayerSweep(FASTKV, 32, 32, 1024)
    layers = [int(each.label) for each in sweep.candidates()]
    assert layers[0] == 0 and layers[-1] == 30 and 15 in layers and len(layers) <= 13
    assert sweep.published() == "15"
    few = TspLayerSweep(FASTKV, 4, 32, 1024).candidates()
    assert [each.settings for each in few] == [{"tsp_layer": layer} for layer in (0, 1, 2)]
    assert few[1].pairs == ((1, 2), (1, 3))
    assert few[1].work == pytest.approx((2 + 2 * 224 / 1024) / 4)  # 7 pages of 32 go on


def test_group_candidates_are_the_divisors_led_by_first_and_last() -> None:
    sweep = GroupLayersSweep(WINDOWKV, 8, 32)
    tried_settings = [each.settings for each in sweep.candidates()]
    assert tried_settings == [{"group_layers": 1}] + [
        {"group_layers": size} | more
        for size in (2, 4, 8)
        for more in ({}, {"group_leader": "last"})
    ]
    assert sweep.published() == "2"
    last = next(each for each in sweep.candidates() if each.label == "4, last")
    assert last.pairs == ((3, 0), (3, 1), (3, 2), (7, 4), (7, 5), (7, 6)) and last.work == 0.25
    assert last.of(WINDOWKV).leader_of_group(8) == 3


def test_what_a_layer_would_select_is_what_fastkv_selects() -> None:
    """Read with transformers; compared with the formula of `bench parity`."""
    task = needle_task(Random(1), 300, 0.4)
    ids = tuple(LocalEncoder(MODEL).chat_ids(task.prompt))
    sweep = TspLayerSweep(FASTKV, 4, 32, 300)
    n = len(ids)
    for layer, obs in enumerate(Reader(MODEL, "float32").read(ids, 8)):
        method = FastKV.of(FASTKV.model_copy(update={"tsp_layer": layer}), 4, 30, 32)
        logits = torch.einsum("whgd,hnd->hgwn", obs.queries, obs.keys) * obs.scale
        future = torch.arange(n) > obs.query_positions[:, None]
        paid = logits.masked_fill(future, -torch.inf).softmax(dim=-1)
        expected = method.propagated(paid)
        chosen = sweep.choose(obs, layer)[0].nonzero().flatten().tolist()
        assert chosen == expected[: len(chosen)].tolist() and len(chosen) > 20


def of(score: float, work: float, full: float = 1.0) -> Tried:
    cells = [
        Cell(GROUP, Row(name, kind), 100, {str(i): float(i < 100 * right) for i in range(100)})
        for name, kind, right in (("own", "preset", score), ("plain vLLM", "plain", full))
    ]
    return tried(Candidate(f"{work}", {}, work, ()), torch.eye(2), cells)


def test_the_least_work_that_keeps_98_percent_is_advised() -> None:
    found = [of(0.3, 0.4), of(0.98, 0.6), of(1.0, 0.8)]
    assert advised(found) is found[1]
    assert advised([of(0.97, 0.6), found[0]]) is None
    alike = [of(0.98, 0.5), of(1.0, 0.5)]
    assert advised(alike) is alike[1]
    assert isinstance(found[0].against_full[0], Pairing) and found[0].against_full[0].worse == 70


@pytest.mark.engine
def test_the_demo_model_is_told_to_select_after_its_third_layer(tmp_path) -> None:
    report = tmp_path / "tsp.json"
    given = ["tune", "tsp-layer", "--n", "6", "--length", "700", "--layers", "1", "2"]
    result = CliRunner().invoke(app, [*given, "--threads", "1", "--json", str(report)])
    assert result.exit_code == 0, result.output
    said = json.loads(report.read_text())
    assert said["advised"] == {"tsp_layer": 2}
    assert """--kv-compress-config '{"tsp_layer": 2}'""" in result.output
    assert [row[0] for row in said["tables"][0]["rows"]] == ["1, published", "2"]
    assert [said["overlaps"][l][l] for l in range(4)] == pytest.approx([1.0] * 4)
    assert (tmp_path / "tsp.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["tsp-layer", "--preset", "snapkv"], "propagates all tokens"),
        (["tsp-layer", "--layers", "3"], "tsp_layer=3 leaves no layer above it"),
        (["group-layers", "--preset", "nothing.yaml"], "cannot read preset file nothing.yaml"),
        (["group-layers", "--model", "./nowhere"], "there is no model folder ./nowhere"),
        (["tsp-layer", "--n", "1", "--tasks", "span", "--length", "20000"], "no prompt fits"),
    ],
)
def test_what_cannot_be_tuned_is_said_in_one_line(given, says) -> None:
    result = CliRunner().invoke(app, ["tune", *given])
    assert result.exit_code == 2 and says in result.output
    assert "Traceback" not in result.output
