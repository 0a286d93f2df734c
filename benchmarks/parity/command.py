"""`vllm-kvcompress bench parity`."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from vllm_kvcompress.bench.engine import BLOCK_TOKENS, MODEL
from vllm_kvcompress.bench.errors import BenchError
from vllm_kvcompress.bench.harness import Summary, Verdict, model_name, write_report
from vllm_kvcompress.bench.options import ListCommand, Threads, existing_model
from vllm_kvcompress.bench.quality.ask import Ask
from vllm_kvcompress.bench.quality.case import Case
from vllm_kvcompress.bench.quality.encode import LocalEncoder, encoded
from vllm_kvcompress.bench.quality.judge import Pairing
from vllm_kvcompress.bench.quality.phases import Options, Policies
from vllm_kvcompress.bench.quality.rows import Cell, Group, Row
from vllm_kvcompress.bench.quality.run import Plan
from vllm_kvcompress.bench.quality.scoring import score
from vllm_kvcompress.bench.quality.tasks import make_cases
from vllm_kvcompress.bench.table import Table
from vllm_kvcompress.bench.terminal import conclude, show_results, terminal
from vllm_kvcompress.presets import Preset, load_preset, shipped_presets

METHODS = ("fastkv", "windowkv", "windowkv-paper")
AT_ONCE = 64
SAME = 0.01  # of the answers may be right on one side only, less the other


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
        typer.Option(
            callback=existing_model,
            help="A model folder of the Llama family.",
            show_default="the shipped demo model",
        ),
    ] = str(MODEL),
    policies: Annotated[
        list[str] | None,
        typer.Option(help=f"Among {', '.join(METHODS)}, or files of such presets; default: all."),
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option(help="Of `bench quality`; default: demo.")
    ] = None,
    length: Annotated[int, typer.Option(min=64, help="Prompt tokens.")] = 1024,
    budget: Annotated[
        float, typer.Option(min=0.001, max=1, help="Share of the cache to hold.")
    ] = 0.125,
    n: Annotated[int, typer.Option(min=1, help="Prompts of each task.")] = 100,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    threads: Threads = 0,
    json: Annotated[Path, typer.Option(help="The report.")] = Path("results/parity.json"),
) -> None:
    """Whether FastKV and WindowKV in the engine answer as a dense model that keeps the same tokens.

    The dense model is transformers', in float32, with a mask for every layer and head. It selects
    by itself, by a second implementation of both methods that shares no code with the policies:
    what it shares is the presets' numbers and the rounding to whole pages.

    **better / worse**: answers that only the engine, or only the dense model, got right.
    Exit code 1 where exact match differs by more than a point; 2: it could not be measured.

    Example: `vllm-kvcompress bench parity --n 20 --tasks needle --policies fastkv windowkv`
    """
    threads = threads or len(os.sched_getaffinity(0))
    try:
        presets = [_preset(name) for name in policies or METHODS]
        found = compare(model, presets, tasks or ["demo"], length, budget, n, seed, threads)
    except ValueError as error:
        raise BenchError(str(error)) from None
    columns = ("policy, task", "engine, %", "dense, %", "better / worse", "same words")
    note = f"{n} prompts of {length:,} tokens each, the same for both; greedy."
    table = Table("Engine and dense reference", columns, [each.row() for each in found], note)
    verdicts = [each.verdict() for each in found]
    console = terminal()
    show_results(console, [table], verdicts)
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
    conclude(console, [json], verdicts)


@dataclass(frozen=True)
class _Asked:
    preset: Preset
    case: Case
    ask: Ask


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
        BenchError: the engine cannot start, or no case can reach the budget.
        ValueError: an unknown task, or a length too short for it.
    """
    encoder = LocalEncoder(model)
    made = make_cases(
        tasks, [length], [], n, seed, lambda text: len(encoder.plain_ids(text, False))
    )
    cases, prompts, longest = encoded(made, encoder)
    own = {preset.name: preset for preset in presets}
    plan = Plan(cases, prompts, [False], BLOCK_TOKENS, own)
    rows = {name: Row(name, "preset", budget) for name in own}
    wished = [(p, case, plan.ask(case, rows[p.name], False)) for p in presets for case in cases]
    asked = [_Asked(preset, case, ask) for preset, case, ask in wished if ask is not None]
    if not asked:
        raise BenchError(f"no prompt of {length} tokens can hold {budget:.1%}: give a longer one")
    policies = Policies([budget], own, own)
    options = Options(model, "float32", threads, AT_ONCE, BLOCK_TOKENS, policies)
    with options.engine("vLLM with kv-compress", longest) as engine:
        answers = engine.answers([each.ask for each in asked])
        ours = [answer.text for answer in tqdm(answers, desc="engine", total=len(asked))]
    theirs = _dense_answers(model, asked, ours, encoder, threads)
    found = []
    for name in own:
        for task in dict.fromkeys(case.task for case in cases):
            of = [i for i, a in enumerate(asked) if (a.preset.name, a.case.task) == (name, task)]
            group = Group(task, length, False)
            ours_cell, theirs_cell = (
                Cell(
                    group,
                    rows[name],
                    len(of),
                    {asked[i].case.key: score(asked[i].case, said[i]) for i in of},
                )
                for said in (ours, theirs)
            )
            if of:
                said = [(ours[i], theirs[i]) for i in of]
                found.append(Parity(name, task, said, Pairing(ours_cell, theirs_cell)))
    return found


def _dense_answers(
    model: str, asked: Sequence[_Asked], drafts: Sequence[str], encoder: LocalEncoder, threads: int
) -> list[str]:
    import torch

    from vllm_kvcompress.bench.parity.dense import Dense
    from vllm_kvcompress.bench.parity.methods import FastKV, WindowKV

    torch.set_num_threads(threads)
    dense, said = Dense(model), []
    for each, draft in tqdm(zip(asked, drafts, strict=True), desc="dense", total=len(asked)):
        maker = WindowKV if each.preset.scorer.name == "windows" else FastKV
        method = maker.of(each.preset, dense.layers, each.ask.held_tokens, BLOCK_TOKENS)
        prompt = each.ask.prompt
        guess = encoder.plain_ids(draft, False)
        ids = dense.answer(list(prompt.token_ids), method, guess, prompt.max_tokens)
        said.append(encoder.tokenizer.decode(ids, skip_special_tokens=True))
    return said


def _preset(name_or_file: str) -> Preset:
    """As it serves needles: of its tasks, the one for answers that stand in one place."""
    if name_or_file in METHODS:
        preset = shipped_presets()[name_or_file]
    elif name_or_file.endswith((".yaml", ".yml")):
        preset = load_preset(name_or_file)
    else:
        raise ValueError(f"no dense reference for {name_or_file!r}: choose {', '.join(METHODS)}")
    return preset.for_task("localization") if preset.tasks else preset
