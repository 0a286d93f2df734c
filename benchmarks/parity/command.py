"""`vllm-kvcompress bench parity`."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from tqdm import tqdm

from vllm_kvcompress.bench.engine import BLOCK_TOKENS, MODEL
from vllm_kvcompress.bench.harness import Summary, Verdict, model_name, write_report
from vllm_kvcompress.bench.options import ListCommand
from vllm_kvcompress.bench.quality.ask import BenchError
from vllm_kvcompress.bench.quality.case import Case
from vllm_kvcompress.bench.quality.command import Options, Policies, encoded
from vllm_kvcompress.bench.quality.encode import LocalEncoder
from vllm_kvcompress.bench.quality.judge import Pairing
from vllm_kvcompress.bench.quality.rows import Cell, Group, Row
from vllm_kvcompress.bench.quality.run import Plan
from vllm_kvcompress.bench.quality.scoring import score
from vllm_kvcompress.bench.quality.tasks import make_cases
from vllm_kvcompress.bench.table import Table
from vllm_kvcompress.presets import Preset, load_preset, shipped_presets

METHODS = ("fastkv", "windowkv", "windowkv-paper")
AT_ONCE = 64
SAME = 0.01  # of the answers may be right on one side only, less the other
TROUBLE, DIFFERENT = 2, 1


@dataclass(frozen=True)
class Parity:
    """What the engine and the dense model said to the same prompts, and how right it was."""

    preset: str
    task: str
    said: Sequence[tuple[str, str]]
    pairing: Pairing

    @property
    def identical(self) -> float:
        return sum(ours == theirs for ours, theirs in self.said) / len(self.said)

    def row(self) -> list[str]:
        ours, theirs = self.pairing.ours.score, self.pairing.theirs.score
        return [
            f"{self.preset}, {self.task}",
            f"{100 * ours:.1f}",
            f"{100 * theirs:.1f}",
            f"{self.pairing.better} / {self.pairing.worse}",
            f"{self.identical:.1%}",
        ]

    def verdict(self) -> Verdict:
        gap = abs(self.pairing.gain)
        what = f"{self.preset}, {self.task}: exact match, engine less dense model"
        return Verdict(what, Summary(gap, gap, gap), SAME, at_most=True)


app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command(cls=ListCommand)
def main(
    model: Annotated[
        str,
        typer.Option(help="A model folder of the Llama family.", show_default="the demo model"),
    ] = str(MODEL),
    policies: Annotated[
        list[str] | None,
        typer.Option(help=f"Among {', '.join(METHODS)}, or files of such presets; default: all."),
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option(help="Of `bench quality`; default: demo.")
    ] = None,
    length: Annotated[int, typer.Option(min=64, help="Prompt tokens.")] = 1024,
    budget: Annotated[float, typer.Option(help="Share of the cache to hold.")] = 0.125,
    n: Annotated[int, typer.Option(min=1, help="Prompts of each task.")] = 100,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    threads: Annotated[int, typer.Option(min=0, help="OpenMP threads; 0: all cores.")] = 0,
    json: Annotated[Path, typer.Option(help="The report.")] = Path("results/parity.json"),
) -> None:
    """Whether FastKV and WindowKV in the engine answer as a dense model that keeps the same tokens.

    The dense model is transformers', in float32, with a mask for every layer and head. It selects
    by itself, by a second implementation of both methods that shares no code with the policies:
    what it shares is the presets' numbers and the rounding to whole pages.

    **better / worse**: answers that only the engine, or only the dense model, got right.
    Exit code 1 where exact match differs by more than a point; 2: it could not be measured.
    """
    threads = threads or len(os.sched_getaffinity(0))
    try:
        presets = [_preset(name) for name in policies or METHODS]
        found = compare(model, presets, tasks or ["demo"], length, budget, n, seed, threads)
    except (BenchError, ValueError) as error:
        typer.echo(f"bench parity: {error}", err=True)
        raise typer.Exit(TROUBLE) from None
    columns = ("policy, task", "engine, %", "dense, %", "better / worse", "same words")
    note = f"{n} prompts of {length:,} tokens each, the same for both; greedy."
    table = Table("Engine and dense reference", columns, [each.row() for each in found], note)
    verdicts = [each.verdict() for each in found]
    console = Console()
    console.print(table.rich())
    for verdict in verdicts:
        console.print(verdict.text(), highlight=False)
    parameters = dict(tasks=tasks, length=length, budget=budget, n=n, seed=seed)
    write_report(
        json,
        threads,
        {"model": model_name(model), **parameters},
        bench="parity",
        title="FastKV and WindowKV beside a dense model with the same selection",
        tables=[table],
        verdicts=verdicts,
    )
    if not all(verdict.met for verdict in verdicts):
        raise typer.Exit(DIFFERENT)


def compare(
    model: str,
    presets: Sequence[Preset],
    tasks: Sequence[str],
    length: int,
    budget: float,
    n: int,
    seed: int,
    threads: int,
) -> list[Parity]:
    """Ask the engine, then the dense model, and put their answers side by side.

    Raises:
        BenchError: the engine cannot start.
        ValueError: a preset that is neither FastKV nor WindowKV.
    """
    import torch

    from vllm_kvcompress.bench.parity.dense import Dense
    from vllm_kvcompress.bench.parity.methods import FastKV, WindowKV

    encoder = LocalEncoder(model)
    made = make_cases(tasks, [length], [], n, seed, lambda text: 0)
    cases, prompts, longest = encoded(made, encoder)
    own = {preset.name: preset for preset in presets}
    options = Options(
        model=model,
        dtype="float32",
        url="",
        threads=threads,
        at_once=AT_ONCE,
        block_tokens=BLOCK_TOKENS,
        cache_blocks=0,
        policies=Policies([budget], own, own),
        peers=[],
        fp8=False,
    )
    plan = Plan(cases, prompts, [False], BLOCK_TOKENS, own)
    rows = {preset.name: Row(preset.name, "preset", budget) for preset in presets}
    asked: list[tuple[Preset, Case, int]] = []
    asks = []
    for preset in presets:
        for case in cases:
            if (ask := plan.ask(case, rows[preset.name], False)) is not None:
                asked.append((preset, case, ask.held_tokens))
                asks.append(ask)
    with options.engine("vLLM with kv-compress", longest) as engine:
        texts = [a.text for a in tqdm(engine.answers(asks), total=len(asks), desc="engine")]
    torch.set_num_threads(threads)
    dense = Dense(model)
    said: dict[tuple[str, str], list[tuple[str, str]]] = {}
    scores: dict[tuple[str, str], tuple[dict[str, float], dict[str, float]]] = {}
    bar = tqdm(zip(asked, texts, strict=True), total=len(texts), desc="dense model")
    for (preset, case, held), text in bar:
        maker = WindowKV if preset.scorer.name == "windows" else FastKV
        method = maker.of(preset, dense.layers, held, BLOCK_TOKENS)
        prompt = prompts[case.key]
        draft = encoder.plain_ids(text, False)
        ids = dense.answer(list(prompt.token_ids), method, draft, prompt.max_tokens)
        theirs = encoder.tokenizer.decode(ids, skip_special_tokens=True)
        where = preset.name, case.task
        said.setdefault(where, []).append((text, theirs))
        engine_scores, dense_scores = scores.setdefault(where, ({}, {}))
        engine_scores[case.key] = score(case, text)
        dense_scores[case.key] = score(case, theirs)
    out = []
    for (name, task), pairs in said.items():
        group = Group(task, length, False)
        ours, theirs_ = (Cell(group, rows[name], len(pairs), each) for each in scores[name, task])
        out.append(Parity(name, task, pairs, Pairing(ours, theirs_)))
    return out


def _preset(name_or_file: str) -> Preset:
    """As it serves needles: of its tasks, the one for answers that stand in one place."""
    if name_or_file in METHODS:
        preset = shipped_presets()[name_or_file]
    elif name_or_file.endswith((".yaml", ".yml")):
        preset = load_preset(name_or_file)
    else:
        raise ValueError(f"no dense reference for {name_or_file!r}: choose {', '.join(METHODS)}")
    return preset.for_task("localization") if preset.tasks else preset
