"""How much of what a model can recall survives a policy, at equal held share.

    python -m vllm_kvcompress.bench.policy_sweep

The demo model reads each prompt once with its full cache; then every policy chooses what to keep
as the engine would, and the answer is read off what is left: the kept tokens of each (layer, KV
head), the tail, and the answer's own tokens. An answer counts when all its tokens are the most
likely ones; that is what greedy decoding produces, token by token, if and only if it is right.
All policies and the full cache answer the same prompts.
"""

import argparse
import json
import platform
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers.utils import logging

from vllm_kvcompress import accounting
from vllm_kvcompress.bench.charts import (
    COLOURS,
    CONTROL_COLOUR,
    DPI,
    held_shares,
    legend_below,
    panels,
    pyplot,
)
from vllm_kvcompress.bench.demo_model.language import (
    Form,
    Task,
    many_facts_task,
    needle_task,
    span_task,
)
from vllm_kvcompress.bench.engine import MODEL
from vllm_kvcompress.bench.policy_reader import Reader, Reading
from vllm_kvcompress.bench.quality.judge import CONTROL
from vllm_kvcompress.policy import Observation, Policy, build
from vllm_kvcompress.presets import DEFAULT_PRESET, Preset, load_preset, shipped_presets

FACTS = 16
FORMS: tuple[Form, ...] = ("chat", "plain")
TASKS: dict[str, Callable[[random.Random, int], Task]] = {
    "needle": lambda rng, n: needle_task(rng, n, rng.random(), form=rng.choice(FORMS)),
    "many_facts": lambda rng, n: many_facts_task(rng, n, FACTS, form=rng.choice(FORMS)),
    "span": lambda rng, n: span_task(rng, n, rng.random(), form=rng.choice(FORMS)),
}
# The default preset with one part of it put back to what KV-Compress publishes.
ABLATIONS: dict[str, dict[str, Any]] = {
    "queries-sum": {"scorer": {"queries": "sum"}},
    "group-sum": {"scorer": {"group": "sum"}},
    "both-sums": {"scorer": {"queries": "sum", "group": "sum"}},
    "both-sums-uniform": {
        "scorer": {"queries": "sum", "group": "sum"},
        "allocator": {"name": "uniform"},
    },
    "pool-both-sides-7": {"scorer": {"pool_side": "both", "pool_tokens": 7}},
    "pool-both-sides-21": {"scorer": {"pool_side": "both", "pool_tokens": 21}},
    "no-pool": {"scorer": {"pool": "none"}},
    "uniform": {"allocator": {"name": "uniform"}},
    "adaptive": {"allocator": {"name": "adaptive"}},
    "window-8": {"window_tokens": 8},
    "window-32": {"window_tokens": 32},
    "protect-32": {"recent_tokens": 32},
}


@dataclass(frozen=True)
class Case:
    """One way to compress: a preset's policy at a rate and a block size."""

    preset: Preset
    policy: Policy
    rate: float
    block_tokens: int

    @property
    def name(self) -> str:
        return self.preset.name


@dataclass
class Result:
    """What one case kept of one task, over all prompts; `full_right` is the full cache's."""

    preset: str
    task: str
    prompt_tokens: int
    block_tokens: int
    rate: float
    held_share: float
    prompts: int
    right: int
    full_right: int
    lost: int  # right with the full cache, wrong with this

    @property
    def accuracy(self) -> float:
        return self.right / self.prompts

    @property
    def of_full(self) -> float:
        return self.right / self.full_right if self.full_right else float("nan")


def kept_tokens(case: Case, scores: Tensor) -> tuple[Tensor, float]:
    """What the engine would hold: bool `[L, H, n]` with the tail, and the held share.

    `scores` are those of the case's own scorer, `[L, H, n]`.
    """
    layers, heads, n = scores.shape
    block = case.block_tokens
    settings = case.preset.settings(rate=case.rate, budget_tokens=None)
    plan = accounting.plan(n, block, 1 << 30, settings)
    seen = torch.ones(layers, heads, n, dtype=torch.bool)
    if plan.first_point != n:
        return seen, 1.0
    full = n // block * block
    sinks, recent = accounting.protected_tokens(n, block, settings)
    total = plan.arena_blocks * layers * heads
    kept = case.policy.keep(scores[..., :full], total, block, sinks, recent)
    body = torch.zeros(layers * heads * full, dtype=torch.bool)
    body[kept.indices] = True
    seen[..., :full] = body.view(layers, heads, full)
    return seen, accounting.held_share(plan)


def score(case: Case, reading: Reading, scale: float) -> Tensor:
    """The case's scores of a prompt, f32 `[L, H, n]`."""
    n = reading.keys[0].shape[1]
    window = min(case.preset.window_tokens, n)
    observed = zip(reading.queries, reading.keys, reading.values, strict=True)
    own = {
        layer: case.policy.scorer.score(
            Observation(
                queries=queries[-window:],
                query_positions=torch.arange(n - window, n),
                keys=keys,
                values=values,
                positions=torch.arange(n),
                valid=None,
                scale=scale,
            ),
            layer,
        )
        for layer, (queries, keys, values) in enumerate(observed)
        if case.policy.leader(layer) == layer
    }
    return torch.stack([own[case.policy.leader(layer)] for layer in range(len(reading.keys))])


def sweep(
    reader: Reader,
    cases: Sequence[Case],
    tasks: Iterable[str],
    prompt_tokens: int,
    prompts: int,
    seed: int = 0,
) -> list[Result]:
    """Ask every case the same prompts; a bar shows how far it is."""
    results: list[Result] = []
    by_name = {case.name: case for case in cases}
    for task in tasks:
        mine = [
            Result(c.name, task, prompt_tokens, c.block_tokens, c.rate, 0.0, prompts, 0, 0, 0)
            for c in cases
        ]
        rng = random.Random(f"{seed} {task} {prompt_tokens}")
        for _ in tqdm(range(prompts), desc=f"{task} {prompt_tokens}", unit="prompt"):
            # Up to 31 tokens shorter, so that last blocks are filled to every degree alike.
            ids, answer = reader.encode(TASKS[task](rng, prompt_tokens - rng.randrange(32)))
            reading = reader.read(ids)
            scores = {name: score(c, reading, reader.scale) for name, c in by_name.items()}
            kept = [kept_tokens(case, scores[case.name]) for case in cases]
            seen, shares = zip(*kept, strict=True)
            everything = torch.ones_like(seen[0])
            full, *right = _in_parts(reader, reading, answer, [everything, *seen])
            for result, ok, share in zip(mine, right, shares, strict=True):
                result.right += ok
                result.full_right += full
                result.lost += full and not ok
                result.held_share += share / prompts
        results += mine
    return results


def _in_parts(
    reader: Reader, reading: Reading, answer: Tensor, seen: list[Tensor], size: int = 32
) -> Iterator[bool]:
    for start in range(0, len(seen), size):
        part = torch.stack(seen[start : start + size])
        yield from reader.answers_right(reading, answer, part).tolist()


def make_cases(
    presets: Iterable[Preset], rates: Iterable[float], block_sizes: Iterable[int], layers: int
) -> list[Case]:
    rates, block_sizes = list(rates), list(block_sizes)
    return [
        Case(preset, build(preset, layers), rate, block)
        for preset in presets
        for block in block_sizes
        for rate in rates
    ]


def table(results: Sequence[Result]) -> str:
    """Markdown, one row per preset and block size, one column per rate."""
    rates = sorted({r.rate for r in results})
    lines = []
    for task in dict.fromkeys(r.task for r in results):
        of_task = [r for r in results if r.task == task]
        first = of_task[0]
        lines += [
            f"{task}, {first.prompt_tokens} tokens, {first.prompts} prompts, "
            f"full cache {first.full_right / first.prompts:.3f}",
            "",
            "| preset | B | " + " | ".join(f"{rate:g}x" for rate in rates) + " |",
            "|---|---|" + "---|" * len(rates),
        ]
        for preset, block in dict.fromkeys((r.preset, r.block_tokens) for r in of_task):
            row = {
                r.rate: f"{r.accuracy:.3f} ({r.held_share:.3f})"
                for r in of_task
                if (r.preset, r.block_tokens) == (preset, block)
            }
            lines.append(f"| {preset} | {block} | " + " | ".join(row[r] for r in rates) + " |")
        lines.append("")
    return "\n".join(lines)


def plot(results: Sequence[Result], path: Path) -> None:
    """Accuracy over held share, a row of panels per block size, a panel per task."""
    tasks = list(dict.fromkeys(r.task for r in results))
    blocks = sorted({r.block_tokens for r in results})
    presets = list(dict.fromkeys(r.preset for r in results))
    presets.sort(key=lambda name: name != DEFAULT_PRESET)
    looks = product(("-", "--"), COLOURS)
    styles = {name: next(looks) for name in presets if name != CONTROL}
    styles[CONTROL] = (":", CONTROL_COLOUR)
    figure, grid = panels(len(blocks) * len(tasks), columns=len(tasks), share_y=True)
    for axes, (block, task) in zip(grid, product(blocks, tasks), strict=True):
        here = [r for r in results if (r.task, r.block_tokens) == (task, block)]
        for preset in presets:
            line = sorted((r.held_share, r.accuracy) for r in here if r.preset == preset)
            dashes, colour = styles[preset]
            style = {"color": colour, "ls": dashes, "marker": "o", "markersize": 3, "label": preset}
            wide = 2.4 if preset == DEFAULT_PRESET else 1.3
            axes.plot(*zip(*line, strict=True), linewidth=wide, **style)
        axes.axhline(
            here[0].full_right / here[0].prompts, color="#444444", ls=":", lw=1, label="full cache"
        )
        held_shares(axes, (r.held_share for r in here))
        axes.set(title=f"{task.replace('_', ' ')}, B = {block}", ylim=(-0.03, 1.03))
    grid[0].set_ylabel("exact match")
    legend_below(figure, grid)
    figure.savefig(path, dpi=DPI)
    pyplot().close(figure)


def ablations(preset: Preset) -> list[Preset]:
    """The preset itself, and with each of `ABLATIONS`."""
    changed = [preset]
    for name, changes in ABLATIONS.items():
        fields = preset.model_dump()
        for key, change in changes.items():
            merge = isinstance(change, dict) and "name" not in change
            fields[key] = fields[key] | change if merge else change
        changed.append(Preset(**{**fields, "name": name}))
    return changed


def find_preset(name_or_file: str) -> Preset:
    """A preset as it serves these tasks, whose answers stand in one place of the prompt.

    Raises:
        ValueError: it does more than keep part of a full cache.
    """
    shipped = shipped_presets()
    preset = shipped[name_or_file] if name_or_file in shipped else load_preset(name_or_file)
    if preset.propagates:
        raise ValueError(
            f"preset {preset.name!r} changes the prefill, but here every prompt is read in full: "
            "measure it with `vllm-kvcompress bench quality`"
        )
    return preset.for_task("localization") if preset.tasks else preset


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Exact match per policy, rate and block size.")
    parser.add_argument("--preset", action="append", help="name or YAML file; default: all shipped")
    parser.add_argument("--ablate", action="store_true", help="the default preset, part by part")
    parser.add_argument("--rate", type=float, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--block", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024])
    parser.add_argument("--prompts", type=int, default=300, help="per task and length")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--json", type=Path, help="write all results there")
    parser.add_argument("--plot", type=Path, help="write a PNG there; needs matplotlib")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    try:
        # Recompression while decoding does not show in answers this short.
        shipped = shipped_presets().items()
        names = args.preset or [n for n, p in shipped if not p.continual and not p.propagates]
        presets = [find_preset(name) for name in names]
        if args.ablate:
            presets = ablations(shipped_presets()[DEFAULT_PRESET])
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        reader = Reader(args.model)
        cases = make_cases(presets, args.rate, args.block, reader.layers)
    except ValueError as error:
        parser.error(str(error))
    results: list[Result] = []
    for tokens in args.tokens:
        done = sweep(reader, cases, args.task, tokens, args.prompts, args.seed)
        print("\n" + table(done), flush=True)
        results += done
    if args.json:
        args.json.write_text(json.dumps(report(results, args), indent=1) + "\n")
    if args.plot:
        plot(results, args.plot)


def report(results: Sequence[Result], args: argparse.Namespace) -> dict[str, Any]:
    return {
        "machine": f"{platform.machine()}, {args.threads} thread(s)",
        "torch": torch.__version__,
        "seed": args.seed,
        "results": [asdict(r) | {"accuracy": r.accuracy, "of_full": r.of_full} for r in results],
    }


if __name__ == "__main__":
    main()
