"""What the demo model still recalls in the running engine, policy by policy.

python benchmarks/quality.py --n 300 --json quality.json --plot quality.png
"""

import os
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

from vllm_kvcompress import accounting
from vllm_kvcompress.bench.demo_model.language import (
    Task,
    many_facts_task,
    needle_task,
    span_task,
)
from vllm_kvcompress.bench.engine import BLOCK_TOKENS, MODEL, EngineSpec, open_engine, prepare
from vllm_kvcompress.bench.harness import Summary, Verdict, write_report
from vllm_kvcompress.config import OFF, EngineConfig, shipped_presets

FACTS = 16
SPARE_TOKENS = 4  # what an answer may go on for before it is cut, and wrong
TASKS: dict[str, Callable[[random.Random, int], Task]] = {
    "needle": lambda rng, n: needle_task(rng, n, rng.random()),
    "many facts": lambda rng, n: many_facts_task(rng, n, FACTS),
    "span": lambda rng, n: span_task(rng, n, rng.random()),
}
OF_FULL = {2.0: 0.99, 4.0: 0.98, 8.0: 0.97}
CLEARLY = 0.1
RATES = (2.0, 4.0, 8.0, 16.0)
CACHE_BLOCKS = 6000
REQUESTS_AT_ONCE = 160


@dataclass
class Cell:
    """A policy at a rate on one task; `right[i]` and `full_right[i]` are of the same prompt."""

    task: str
    prompt_tokens: int
    policy: str
    rate: float
    held_share: float = 1.0
    right: list[bool] = field(default_factory=list)
    full_right: list[bool] = field(default_factory=list)

    @property
    def accuracy(self) -> float:
        return sum(self.right) / len(self.right)

    @property
    def of_full(self) -> float:
        full = sum(self.full_right)
        return sum(self.right) / full if full else float("nan")

    @property
    def lost(self) -> int:
        """Right with the full cache, wrong here."""
        return sum(f and not r for f, r in zip(self.full_right, self.right, strict=True))

    def knobs(self) -> dict[str, Any]:
        return {"kv_compress": self.policy, "kv_compress_rate": self.rate}


class Asker:
    """The engine, asked the same prompt under every policy at once.

    The policies share the prompt's blocks by prefix caching: only the first pays for it.
    """

    def __init__(self, model: str, longest_prompt: int) -> None:
        spec = EngineSpec(
            model=model,
            cache_blocks=CACHE_BLOCKS,
            kv_compress={"preset": OFF},
            max_model_len=longest_prompt + 64,
            batched_tokens=8192,
            max_seqs=256,
        )
        self.llm = open_engine(spec)
        self.tokenizer = self.llm.get_tokenizer()

    def encode(self, task: Task) -> list[int]:
        turn = [{"role": "user", "content": task.prompt}]
        return self.tokenizer.apply_chat_template(
            turn, add_generation_prompt=True, return_dict=False
        )

    def answers(self, prompts: Iterable[tuple[Task, list[int]]], cells: Sequence[Cell]) -> Any:
        """Per prompt, whether it is answered with the full cache, and by each cell."""
        from vllm import SamplingParams

        tasks, requests, params = [], [], []
        for task, ids in prompts:
            answer = self.tokenizer.encode(" " + task.answer, add_special_tokens=False)
            for knobs in ({"kv_compress": OFF}, *(cell.knobs() for cell in cells)):
                tasks.append(task)
                requests.append({"prompt_token_ids": ids})
                longest = len(answer) + SPARE_TOKENS
                params.append(SamplingParams(temperature=0, max_tokens=longest, extra_args=knobs))
        outputs = self.llm.generate(requests, params, use_tqdm=False)
        right = [
            output.outputs[0].text.strip() == task.answer
            for task, output in zip(tasks, outputs, strict=True)
        ]
        width = len(cells) + 1
        return [right[i : i + width] for i in range(0, len(right), width)]


def ask(asker: Asker, task: str, tokens: int, cells: Sequence[Cell], n: int, seed: int) -> None:
    """Fill the cells with `n` prompts of one task and length."""
    rng = random.Random(f"{seed} {task} {tokens}")
    made = (TASKS[task](rng, tokens) for _ in range(n))
    size = max(1, REQUESTS_AT_ONCE // (len(cells) + 1))
    with tqdm(total=n, desc=f"{task} {tokens}", unit="prompt") as bar:
        for part in _parts(made, size):
            prompts = [(each, asker.encode(each)) for each in part]
            for full, *right in asker.answers(prompts, cells):
                for cell, ok in zip(cells, right, strict=True):
                    cell.right.append(ok)
                    cell.full_right.append(full)
            for cell in cells:
                cell.held_share = held_share(cell, len(prompts[0][1]))
            bar.update(len(part))
            bar.set_postfix_str(so_far(cells))


def held_share(cell: Cell, prompt_tokens: int) -> float:
    settings = EngineConfig().request_settings(cell.knobs(), max_tokens=prompt_tokens)
    plan = accounting.plan(prompt_tokens, BLOCK_TOKENS, CACHE_BLOCKS, settings)
    return accounting.held_share(prompt_tokens, BLOCK_TOKENS, plan)


def so_far(cells: Sequence[Cell]) -> str:
    """The full cache's accuracy, and every policy's at the highest rate."""
    full = cells[0].full_right
    top = max(cell.rate for cell in cells)
    at_top = [f"{c.policy} {c.accuracy:.0%}" for c in cells if c.rate == top][:3]
    return f"full {sum(full) / len(full):.0%}, at {top:g}x: {', '.join(at_top)}"


def tables(cells: Sequence[Cell]) -> str:
    """Markdown: a table per task and length; accuracy as a share of the full cache's."""
    parts = []
    for task, tokens in dict.fromkeys((c.task, c.prompt_tokens) for c in cells):
        here = [c for c in cells if (c.task, c.prompt_tokens) == (task, tokens)]
        rates = sorted({c.rate for c in here})
        n, full = len(here[0].right), sum(here[0].full_right)
        shares = {r: _share(c.held_share for c in here if c.rate == r) for r in rates}
        heads = [f"{rate:g}x ({shares[rate]} held)" for rate in rates]
        lines = [
            f"**{task}, {tokens} tokens**, n = {n}; full cache {full / n:.1%} right. "
            "Below: right answers in % of the full cache's.",
            "",
            "| policy | " + " | ".join(heads) + " |",
            "|---|" + "---:|" * len(rates),
        ]
        for policy in dict.fromkeys(c.policy for c in here):
            row = {c.rate: f"{100 * c.of_full:.1f}" for c in here if c.policy == policy}
            lines.append(f"| {policy} | " + " | ".join(row.get(r, "") for r in rates) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def verdicts(cells: Sequence[Cell]) -> list[Verdict]:
    """What is promised of the default policy on needles, and of the control."""
    out = []
    needles = [c for c in cells if c.task == "needle" and any(c.full_right)]
    for ours in (c for c in needles if c.policy == "kv-compress" and c.rate in OF_FULL):
        where = f"{ours.prompt_tokens} tokens, {ours.rate:g}x"
        share = Summary(ours.of_full, ours.of_full, ours.of_full)
        out.append(Verdict(f"needle of full, kv-compress, {where}", share, OF_FULL[ours.rate]))
        for control in needles:
            same = (control.prompt_tokens, control.rate) == (ours.prompt_tokens, ours.rate)
            if control.policy == "random" and same:
                chance = Summary(control.of_full, control.of_full, control.of_full)
                bound = round(ours.of_full - CLEARLY, 3)
                out.append(Verdict(f"needle of full, random, {where}", chance, bound, at_most=True))
    return out


def plot(cells: Sequence[Cell], path: Path) -> None:
    """Accuracy over held share: a panel per task and length, a line per policy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = list(dict.fromkeys((c.task, c.prompt_tokens) for c in cells))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, grid = pyplot.subplots(
        rows, columns, figsize=(3.6 * columns, 3.2 * rows + 0.8), squeeze=False, sharey=True
    )
    for axes, (task, tokens) in zip(grid.flat, panels, strict=False):
        here = [c for c in cells if (c.task, c.prompt_tokens) == (task, tokens)]
        for policy in dict.fromkeys(c.policy for c in here):
            line = sorted((c.held_share, c.accuracy) for c in here if c.policy == policy)
            ours = policy == "kv-compress"
            axes.plot(
                *zip(*line, strict=True),
                marker="o",
                markersize=5 if ours else 3,
                linewidth=2.4 if ours else 1.2,
                linestyle="--" if policy == "random" else "-",
                label=policy,
                zorder=3 if ours else 2,
            )
        full = sum(here[0].full_right) / len(here[0].full_right)
        axes.axhline(full, color="#444444", linewidth=1, linestyle=":", label="full cache")
        axes.set_xscale("log", base=2)
        shares = sorted({c.held_share for c in here})
        axes.set_xticks(shares, [f"{share:.0%}" for share in shares])
        axes.minorticks_off()
        axes.set_title(f"{task}, {tokens} tokens", fontsize=10)
        axes.set_xlabel("share of the prompt's cache held")
        axes.set_ylim(-0.03, 1.03)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(grid.flat)[len(panels) :]:
        axes.remove()
    grid[0][0].set_ylabel("answers exactly right")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=5, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.5 / (3.2 * rows + 0.8), 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command(cls=ListCommand)
def main(
    n: Annotated[int, typer.Option(help="Prompts per task and length.", min=1)] = 300,
    tasks: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(TASKS)}; all by default.")
    ] = None,
    tokens: Annotated[
        list[int] | None, typer.Option(help="Prompt lengths; 1024 and 2048 by default.")
    ] = None,
    policies: Annotated[
        list[str] | None, typer.Option(help="Presets; by default all but continual ones.")
    ] = None,
    rates: Annotated[
        list[float] | None, typer.Option(help="Compression rates; 2 4 8 16 by default.")
    ] = None,
    threads: Annotated[int, typer.Option(help="OpenMP threads; 0 for all cores.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    model: Annotated[Path, typer.Option(help="The demo model, or one trained alike.")] = MODEL,
    json: Annotated[Path | None, typer.Option(help="Write every answer there.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Write a PNG there.")] = None,
) -> None:
    """What the demo model still recalls when its cache is compressed, in the running engine.

    Every prompt is answered once with the full cache and once under each policy and rate, side
    by side in one batch; an answer counts when it is exactly right to its last word and ends
    there. Prompts are the demo model's own language: *needle* hides one fact at a random depth,
    *many facts* 16, and *span* asks to continue a list of words that was seen once.

    The first word of an answer comes from the uncompressed prefill in any policy; the rest has
    to be found in what was kept. Compare policies at the same held share (what is really held,
    partly filled blocks included), and on the same prompts, which this does.
    """
    chosen_tasks, lengths = tasks or list(TASKS), tokens or [1024, 2048]
    presets = shipped_presets()
    chosen = policies or [name for name, preset in presets.items() if not preset.continual]
    for given, known in ((chosen_tasks, TASKS), (chosen, presets)):
        if unknown := [name for name in given if name not in known]:
            raise typer.BadParameter(f"{unknown[0]!r} is not one of {', '.join(known)}")
    threads = threads or len(os.sched_getaffinity(0))
    prepare(threads)
    asker = Asker(str(model), max(lengths))
    cells: list[Cell] = []
    for length in lengths:
        for task in chosen_tasks:
            mine = [
                Cell(task, length, policy, rate)
                for policy in sorted(chosen, key=lambda name: name != "kv-compress")
                for rate in rates or RATES
            ]
            ask(asker, task, length, mine, n, seed)
            print("\n" + tables(mine) + "\n", flush=True)
            cells += mine
    for verdict in verdicts(cells):
        print(verdict.text())
    if json:
        parameters = dict(n=n, tasks=chosen_tasks, tokens=lengths, policies=chosen, seed=seed)
        results = [
            {**asdict(c), "accuracy": c.accuracy, "of_full": c.of_full, "lost": c.lost}
            for c in cells
        ]
        judged = [{**asdict(v), "met": v.met} for v in verdicts(cells)]
        write_report(json, threads, parameters, results=results, verdicts=judged)
    if plot_file:
        plot(cells, plot_file)


def _parts(tasks: Iterable[Task], size: int) -> Iterator[list[Task]]:
    part: list[Task] = []
    for task in tasks:
        part.append(task)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part


def _share(shares: Iterable[float]) -> str:
    low, *_, high = sorted([*shares] * 2)
    return f"{low:.1%}" if f"{low:.1%}" == f"{high:.1%}" else f"{low:.1%}-{high:.1%}"


if __name__ == "__main__":
    app()
