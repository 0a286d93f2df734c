"""FastKV and WindowKV in the engine, beside a dense model that selects for itself."""

import json
from dataclasses import dataclass
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from vllm_kvcompress.bench.demo_model.language import needle_task
from vllm_kvcompress.bench.engine import MODEL
from vllm_kvcompress.bench.parity.dense import Dense
from vllm_kvcompress.bench.parity.methods import FastKV, WindowKV, _dealt
from vllm_kvcompress.cli import app
from vllm_kvcompress.presets import shipped_presets


@dataclass
class Everything:
    """A method that drops nothing."""

    tsp_layer: int | None = None
    window_tokens: int = 1

    def kept(self, paid, seen, n):
        return torch.ones(len(paid), paid[0].shape[0], n, dtype=torch.bool)


@pytest.mark.parametrize("draft", ["right", "wrong", "none"])
def test_keeping_everything_says_what_transformers_generates(draft) -> None:
    """Whatever the draft, which only spares passes."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    task = needle_task(Random(3), 150, 0.5, form="plain")
    prompt = tokenizer.encode(task.prompt)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    generated = model.generate(torch.tensor([prompt]), max_new_tokens=7, do_sample=False)
    expected = generated[0, len(prompt) :].tolist()
    guess = {"right": expected, "wrong": [*expected[:2], 20, 21, 22], "none": []}[draft]
    assert Dense(MODEL).answer(prompt, Everything(), guess, 7) == expected


def test_pages_are_dealt_by_largest_remainder_above_a_floor() -> None:
    assert _dealt([247, 168, 88, 9], 16, 1) == [7, 5, 3, 1]  # 7.36, 5.01, 2.62 of 15, and the 1
    assert _dealt([1, 1, 1], 4, 1) == [2, 1, 1]
    assert _dealt([100, 10, 10], 6, 2) == [2, 2, 2]


def test_both_methods_keep_whole_pages_and_the_tail() -> None:
    n, layers, heads, block = 205, 4, 2, 16
    generator = torch.Generator().manual_seed(0)
    paid = [torch.rand(heads, 2, 32, n, generator=generator) for _ in range(layers)]
    seen = [torch.arange(n)] * layers
    fast = FastKV.of(shipped_presets()["fastkv"], layers, 45, block)
    windows = shipped_presets()["windowkv"].for_task("localization")
    for method in (fast, WindowKV.of(windows, layers, 45, block)):
        mine = [p[:, :, -method.window_tokens :] for p in paid]
        kept = method.kept(mine, seen, n)
        held = kept[..., : n // block * block].sum(dim=-1)
        assert (held % block == 0).all() and int(held.sum()) == layers * heads * 2 * block
        assert kept[..., -max(n % block, method.window_tokens) :].all()


@pytest.mark.engine
def test_the_engine_says_what_a_dense_model_with_the_same_selection_says(tmp_path) -> None:
    """Token for token here; the published run is `docs/data/parity.json`."""
    report = tmp_path / "parity.json"
    given = ["bench", "parity", "--n", "3", "--length", "640", "--threads", "1"]
    given += ["--tasks", "needle", "span", "--json", str(report)]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0, result.output
    (table,) = json.loads(report.read_text())["tables"]
    assert [row[0] for row in table["rows"]] == [
        f"{preset}, {task}"
        for preset in ("fastkv", "windowkv", "windowkv-paper")
        for task in ("needle", "span")
    ]
    assert all(row[-1] == "100.0%" for row in table["rows"])


def test_presets_without_a_dense_reference_are_refused() -> None:
    result = CliRunner().invoke(app, ["bench", "parity", "--policies", "snapkv"])
    assert result.exit_code == 2 and "no dense reference for 'snapkv'" in result.output
