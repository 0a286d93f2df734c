"""What compression adds to a prefill, and when the first token comes.

python benchmarks/prefill.py --prompt-tokens 512 2048 8000
"""

import json as jsonlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_kvcompress.bench.charts import COLOURS, PLAIN_COLOUR, log_y, panels, save
from vllm_kvcompress.bench.crossover import Point
from vllm_kvcompress.bench.engine import BLOCK_TOKENS, MODEL, EngineSpec, Workload, environment
from vllm_kvcompress.bench.harness import Summary, Verdict, cpu_model, paired_ratio, write_report
from vllm_kvcompress.bench.options import ListCommand
from vllm_kvcompress.bench.overhead import COMPRESSION, Step, compression_over_rest
from vllm_kvcompress.bench.process import LineProcess, ProcessEnded
from vllm_kvcompress.bench.progress import progress_bar
from vllm_kvcompress.bench.table import Table
from vllm_kvcompress.bench.throughput import Grid, measure
from vllm_kvcompress.bench.variants import COMPRESSING, PLAIN, Variant, variants

REPORT_WIDTH = 110
SAME_WORK, LONGEST = 0.9, 0.8
COLUMNS = (
    "prompt tokens",
    "row",
    "held",
    "first token ms",
    "compressing ms",
    "of the rest",
    "x plain",
)
STOPWATCHES = (sys.executable, "-P", "-m", "vllm_kvcompress.bench.stopwatch_child")

Stopped = Mapping[tuple[int, str], Sequence[Step]]
"""(prompt tokens, row) -> prefills under stopwatches."""


def stopped(
    rows: Sequence[Variant], lengths: Sequence[int], spec: EngineSpec, count: int, threads: int
) -> Stopped:
    """Prefills of the rows that compress, in one engine under stopwatches.

    Raises:
        SystemExit: the engine ended.
    """
    own = replace(spec, kv_compress=COMPRESSING.kv_compress)
    command = [*STOPWATCHES, jsonlib.dumps(asdict(own))]
    ours = [row for row in rows if row.engine == COMPRESSING and row.compresses]
    found: dict[tuple[int, str], list[Step]] = {}
    if not ours:
        return found
    try:
        with (
            progress_bar() as progress,
            LineProcess("the engine under stopwatches", command, environment(threads)) as process,
        ):
            bar = progress.add_task("starting an engine", total=len(ours) * len(lengths))
            process.hear()
            for length in lengths:
                for row in ours:
                    progress.update(bar, description=f"stopwatches: {row.name}, {length:,} tokens")
                    work = Workload(1, length, 1, extra_args=row.asks)
                    process.tell({"work": asdict(work), "count": count})
                    steps = process.hear()["steps"]
                    found[length, row.name] = [Step(**step) for step in steps]
                    progress.advance(bar)
    except ProcessEnded as ended:
        raise SystemExit(str(ended)) from None
    return found


def faster(grid: Grid, point: Point, name: str) -> Summary:
    """Plain vLLM's time to the first token over a row's: above 1 it comes sooner."""
    samples = grid.samples[point]
    return paired_ratio([r.wall_s for r in samples[PLAIN]], [r.wall_s for r in samples[name]])


def table(rows: Sequence[Variant], grid: Grid, watched: Stopped, rounds: int) -> Table:
    lines = []
    for point, samples in grid.samples.items():
        for row in rows:
            where = [f"{point.prompt_tokens:,}", row.name]
            if row.name not in samples:
                lines.append([*where, "refused", *["-"] * (len(COLUMNS) - 3)])
                continue
            steps = watched.get((point.prompt_tokens, row.name))
            lines.append(
                [
                    *where,
                    f"{row.held_share(point.prompt_tokens, grid.cache_blocks):.1%}",
                    f"{Summary.of(1e3 * r.wall_s for r in samples[row.name]).median:,.1f}",
                    _ms(steps) if steps else "-",
                    f"{Summary.of(map(compression_over_rest, steps)).median:.1%}" if steps else "-",
                    faster(grid, point, row.name).text(2),
                ]
            )
    refusals = [f"{name}: {reason}" for name, reason in grid.refused.items()]
    return Table(
        "Time to the first token, one prompt at a time",
        COLUMNS,
        lines,
        " ".join(
            [
                f"Medians of {rounds} rounds, the last with its range. compressing: scoring, "
                "choosing, copying; of the rest: over the prefill without it. x plain: above 1 is "
                "sooner.",
                *refusals,
            ]
        ),
    )


def _ms(steps: Sequence[Step]) -> str:
    return f"{Summary.of(1e3 * step.seconds.get(COMPRESSION, 0.0) for step in steps).median:.2f}"


def verdicts(rows: Sequence[Variant], grid: Grid) -> list[Verdict]:
    """`off` prompts take plain vLLM's time; the longest compressed ones at most 1.25 times it."""
    found = []
    longest = max(grid.samples)
    for point, samples in grid.samples.items():
        for row in rows:
            if row.name in samples and (row.does_plain_work or (row.rate and point == longest)):
                what = f"first token, {row.name}, {point.prompt_tokens:,} tokens"
                target = SAME_WORK if row.does_plain_work else LONGEST
                found.append(Verdict(what, faster(grid, point, row.name), target))
    return found


def plot(rows: Sequence[Variant], grid: Grid, watched: Stopped, path: Path, caption: str) -> None:
    """Time to the first token, and compression's part of it, against the prompt length."""
    figure, (times, shares) = panels(2)
    colours = iter([PLAIN_COLOUR, *COLOURS])
    for row in rows:
        points = [p for p, samples in grid.samples.items() if row.name in samples]
        if not points:
            continue
        colour, lengths = next(colours), [p.prompt_tokens for p in points]
        sums = [Summary.of(1e3 * r.wall_s for r in grid.samples[p][row.name]) for p in points]
        times.plot(lengths, [s.median for s in sums], "o-", color=colour, label=row.name, ms=4)
        low, high = [s.low for s in sums], [s.high for s in sums]
        times.fill_between(lengths, low, high, color=colour, alpha=0.15, linewidth=0)
        parts = [watched.get((n, row.name)) for n in lengths]
        if all(parts):
            of_rest = [Summary.of(map(compression_over_rest, p or ())).median for p in parts]
            shares.plot(lengths, [100 * s for s in of_rest], "o-", color=colour, ms=4)
    log_y(times)
    lengths = [point.prompt_tokens for point in grid.samples]
    for axis in (times, shares):
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [f"{n:,}" for n in lengths])
        axis.set_xlabel("prompt tokens")
    times.set_ylabel("ms to the first token")
    shares.set_ylabel("compressing, % of the rest")
    shares.set_ylim(bottom=0)
    times.legend(frameon=False)
    save(figure, path, caption)


app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command(cls=ListCommand)
def main(
    prompt_tokens: Annotated[
        list[int] | None,
        typer.Option(help="Tokens per prompt, a list (default 512 1024 2048 4096).", min=1),
    ] = None,
    rates: Annotated[list[float] | None, typer.Option(help="Rates (default 8).")] = None,
    presets: Annotated[
        list[str] | None, typer.Option(help="Presets, each at every rate (default kv-compress).")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Measured prompts of every row.", min=1)] = 9,
    threads: Annotated[int, typer.Option(help="OpenMP threads; 0 for all cores.", min=0)] = 0,
    model: Annotated[str, typer.Option(help="A model folder or name.")] = str(MODEL),
    dtype: Annotated[str, typer.Option(help="As vLLM's `--dtype`.")] = "float32",
    load_format: Annotated[str, typer.Option(help="As vLLM's.")] = "auto",
    eager: Annotated[
        bool, typer.Option(help="Without torch.compile, which is on as in `vllm serve`.")
    ] = False,
    batched_tokens: Annotated[
        int, typer.Option(help="Token budget of a step: longer prompts go in chunks.", min=32)
    ] = 2048,
    json: Annotated[Path, typer.Option(help="The report; the plot goes beside it.")] = Path(
        "results/prefill.json"
    ),
) -> None:
    """How much later the first token comes when a prompt is compressed.

    Compression follows the prefill, so it costs time there; what it gains comes while decoding
    (`bench throughput`). One prompt at a time, in an idle engine; the rows take turns.

    * **first token ms**: from submitting the prompt to its first token. **x plain**: plain
      vLLM's time over the row's, round by round: 0.95 is 5 % later.
    * **compressing ms**: scoring, choosing and copying, taken with stopwatches in an engine of
      its own afterwards (as `bench overhead` does); **of the rest**: over the prefill without it.

    Fixed costs weigh most on short prompts of small models. Exit code 1 where `off` prompts take
    longer than plain vLLM's, or the longest compressed ones more than 1.25 times as long.
    """
    threads = threads or len(os.sched_getaffinity(0))
    lengths = sorted(set(prompt_tokens or [512, 1024, 2048, 4096]))
    rows = variants(rates or [8], presets or ["kv-compress"], fp8=False)
    spec = EngineSpec(
        model=model,
        cache_blocks=3 * -(-(lengths[-1] + 1) // BLOCK_TOKENS),
        max_model_len=lengths[-1] + 1,
        batched_tokens=batched_tokens,
        max_seqs=min(16, batched_tokens),
        dtype=dtype,
        load_format=load_format,
        eager=eager,
    )
    points = [Point(1, length) for length in lengths]
    grid = measure(rows, points, spec, Workload(0, 0, 1), rounds, threads)
    watched = stopped(rows, [point.prompt_tokens for point in grid.samples], spec, rounds, threads)

    shown, judged = table(rows, grid, watched, rounds), verdicts(rows, grid)
    console = Console(width=None if sys.stdout.isatty() else REPORT_WIDTH)
    console.print(shown.rich())
    missed = [verdict for verdict in judged if not verdict.met]
    for verdict in missed:
        console.print(verdict.text(), highlight=False)
    console.print(f"{len(judged) - len(missed)} of {len(judged)} verdicts met", highlight=False)
    picture = json.with_suffix(".png")
    caption = f"{threads} thread(s) of {cpu_model()}; median and range of {rounds} rounds"
    plot(rows, grid, watched, picture, caption)
    write_report(
        json,
        threads,
        {**asdict(spec), "rounds": rounds},
        bench="prefill",
        title="Compression in the prefill",
        tables=[shown],
        plots=[picture],
        verdicts=judged,
        refused=grid.refused,
        points=[
            {
                "prompt_tokens": point.prompt_tokens,
                "first_token_s": {name: [r.wall_s for r in rs] for name, rs in samples.items()},
                "stopwatches": {
                    name: [step.seconds for step in steps]
                    for (length, name), steps in watched.items()
                    if length == point.prompt_tokens
                },
            }
            for point, samples in grid.samples.items()
        ],
    )
    console.print(f"written: {json}, {picture}", highlight=False)
    if missed:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
