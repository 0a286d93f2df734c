"""Tokens per second of plain vLLM and of this project, in the same cache, in one run."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_kvcompress.bench import crossover
from vllm_kvcompress.bench.charts import COLOURS, PLAIN_COLOUR, panels, save
from vllm_kvcompress.bench.child import COMMAND, Child
from vllm_kvcompress.bench.crossover import Point
from vllm_kvcompress.bench.engine import BLOCK_TOKENS, MODEL, EngineSpec, Round, Workload
from vllm_kvcompress.bench.errors import BenchError
from vllm_kvcompress.bench.harness import Summary, cpu_model, write_report
from vllm_kvcompress.bench.options import Dtype, ListCommand, Model, Threads
from vllm_kvcompress.bench.process import ProcessEnded
from vllm_kvcompress.bench.progress import progress_bar
from vllm_kvcompress.bench.promises import FIGURES, WORDS, ratio, read_baseline, verdicts
from vllm_kvcompress.bench.table import Table
from vllm_kvcompress.bench.terminal import conclude, show_results, terminal
from vllm_kvcompress.bench.variants import FP8, PLAIN, Variant, started, variants

COLUMNS = ("row", "held", "running", "preempted", "decode tok/s", "x", "tok/s", "x plain")


@dataclass
class Grid:
    """What was measured.

    samples: the rounds of every row that ran, at every point that was finished.
    refused: rows that did not run, with the engine's own words.
    """

    samples: dict[Point, dict[str, list[Round]]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    cache_blocks: int = 0
    cache_bytes: int = 0


def measure(
    rows: Sequence[Variant],
    points: Sequence[Point],
    spec: EngineSpec,
    work: Workload,
    rounds: int,
    threads: int,
    command: Sequence[str] = COMMAND,
) -> Grid:
    """Rounds of every row at every point, rows taking turns inside a round.

    At each point a first round warms up and does not count. An interruption ends the run; the
    points that were finished are returned.

    Raises:
        BenchError: plain vLLM ended.
        KeyboardInterrupt: before any point was finished.
    """
    grid = Grid()
    with progress_bar() as progress:
        bar = progress.add_task("starting engines", total=None)
        with started(rows, spec, threads, refused=grid.refused, command=command) as children:
            plain = children[PLAIN].cache
            grid.cache_blocks, grid.cache_bytes = plain.blocks, plain.total_bytes
            progress.update(bar, total=len(points) * len(children) * (rounds + 1))
            try:
                for point in points:
                    grid.samples[point] = _rounds(
                        [row for row in rows if row.name not in grid.refused],
                        children,
                        replace(work, **point._asdict()),
                        rounds,
                        grid.refused,
                        lambda text, point=point: progress.update(
                            bar, advance=1, description=f"{point.text()}, {text}"
                        ),
                    )
            except KeyboardInterrupt:
                if not grid.samples:
                    raise
    return grid


def _rounds(
    rows: Sequence[Variant],
    children: Mapping[str, Child],
    work: Workload,
    rounds: int,
    refused: dict[str, str],
    tell: Any,
) -> dict[str, list[Round]]:
    samples: dict[str, list[Round]] = {row.name: [] for row in rows}
    for number in range(-1, rounds):
        turn = number % len(rows)
        for row in [*rows[turn:], *rows[:turn]]:
            if row.name in refused:
                continue
            tell(f"{'warm-up' if number < 0 else f'round {number + 1}/{rounds}'}: {row.name}")
            asked = replace(work, seed=work.seed + number, extra_args=row.asks or None)
            try:
                done = children[row.name].run(asked)
            except ProcessEnded as ended:
                if row.name == PLAIN:
                    raise BenchError(f"plain vLLM died: {ended.reason}") from None
                refused[row.name] = ended.reason
                samples.pop(row.name)
                continue
            if number >= 0:
                samples[row.name].append(done)
    return samples


def table(
    point: Point, rows: Sequence[Variant], grid: Grid, output_tokens: int, rounds: int
) -> Table:
    """The rows of one point, plain vLLM first, its ratio last."""
    samples = grid.samples[point]
    return Table(
        f"{point.text()}, {output_tokens} outputs each",
        COLUMNS,
        [_cells(row, point, grid) for row in rows],
        " ".join(
            [
                f"Median and range of {rounds} rounds; cache of {grid.cache_blocks} blocks, "
                f"{grid.cache_bytes / 2**20:.1f} MiB, for every row.",
                *(f"{n}: {grid.refused[n]}" for n in grid.refused if n not in samples),
            ]
        ),
    )


def _cells(row: Variant, point: Point, grid: Grid) -> list[str]:
    samples = grid.samples[point]
    if row.name not in samples:
        return [row.name, "refused", *["-"] * (len(COLUMNS) - 2)]
    rounds = samples[row.name]
    cells = [
        row.name,
        f"{row.held_share(point.prompt_tokens, grid.cache_blocks):.1%}",
        f"{Summary.of(r.mean_running for r in rounds).median:.1f}",
        f"{Summary.of(r.preemptions for r in rounds).median:g}",
    ]
    for figure in ("decode", "total"):
        middle = Summary.of(FIGURES[figure](r) for r in rounds).median
        cells += [f"{middle:,.0f}", ratio(samples, row.name, figure).text(2)]
    return cells


def plot(rows: Sequence[Variant], grid: Grid, path: Path, caption: str) -> None:
    """Tokens/s against the rate, in all and decoding, a row of panels per point."""
    presets = list(dict.fromkeys(row.preset for row in rows if row.preset))
    figure, axes = panels(2 * len(grid.samples))
    for (point, samples), pair in zip(
        grid.samples.items(), zip(axes[::2], axes[1::2], strict=True), strict=True
    ):
        for axis, key in zip(pair, WORDS, strict=True):
            of = FIGURES[key]
            for name, style in ((PLAIN, "-"), (FP8, ":")):
                if name in samples:
                    level = Summary.of(of(r) for r in samples[name])
                    axis.axhline(level.median, color=PLAIN_COLOUR, linestyle=style, label=name)
                    axis.axhspan(level.low, level.high, color=PLAIN_COLOUR, alpha=0.12, lw=0)
            for preset, colour in zip(presets, COLOURS, strict=False):
                ours = [r for r in rows if r.preset == preset and r.name in samples]
                sums = [Summary.of(of(r) for r in samples[row.name]) for row in ours]
                axis.errorbar(
                    [row.rate for row in ours],
                    [s.median for s in sums],
                    [[s.median - s.low for s in sums], [s.high - s.median for s in sums]],
                    fmt="o-",
                    color=colour,
                    capsize=2,
                    markersize=4,
                    label=preset,
                )
            rates = sorted({row.rate for row in rows if row.rate})
            axis.set_xscale("log", base=2)
            axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
            axis.set_ylim(bottom=0)
            axis.set_xlabel("compression rate")
            axis.set_ylabel(WORDS[key])
            axis.set_title(f"{point.prompts} x {point.prompt_tokens:,} tokens")
    axes[0].legend(frameon=False)
    save(figure, path, caption)


app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command(cls=ListCommand)
def main(
    rates: Annotated[
        list[float] | None,
        typer.Option(
            help="Compression rates (default 2 4 8 16). 1 forces everything through an arena."
        ),
    ] = None,
    presets: Annotated[
        list[str] | None, typer.Option(help="Presets, each at every rate (default kv-compress).")
    ] = None,
    prompts: Annotated[
        list[int] | None, typer.Option(help="Requests at once, a list (default 16).", min=1)
    ] = None,
    prompt_tokens: Annotated[
        list[int] | None, typer.Option(help="Tokens per prompt, a list (default 2048).", min=1)
    ] = None,
    output_tokens: Annotated[int, typer.Option(help="Tokens generated per request.", min=1)] = 512,
    hold: Annotated[
        int,
        typer.Option(help="Finished requests of the longest prompt that the cache holds.", min=1),
    ] = 4,
    rounds: Annotated[int, typer.Option(help="Measured rounds of every row.", min=1)] = 5,
    fp8: Annotated[bool, typer.Option(help="A row with --kv-cache-dtype fp8.")] = True,
    off: Annotated[bool, typer.Option(help="A row with kv-compress on, requests off.")] = True,
    flag_off: Annotated[bool, typer.Option(help="A row with the flag off.")] = False,
    against: Annotated[
        Path | None, typer.Option(help="An earlier report: also judge against its ratios.")
    ] = None,
    threads: Threads = 0,
    model: Model = str(MODEL),
    dtype: Dtype = "float32",
    load_format: Annotated[
        str, typer.Option(help="As vLLM's; `dummy` gives a model random weights.")
    ] = "auto",
    eager: Annotated[
        bool, typer.Option(help="Without torch.compile, which is on as in `vllm serve`.")
    ] = False,
    batched_tokens: Annotated[int, typer.Option(help="Token budget of a step.", min=32)] = 2048,
    max_seqs: Annotated[int, typer.Option(help="Most requests in a step.", min=1)] = 128,
    seed: Annotated[int, typer.Option(help="Round r uses prompts of seed + r.")] = 0,
    json: Annotated[
        Path, typer.Option(help="The report with all samples; plots go beside it.")
    ] = Path("results/throughput.json"),
) -> None:
    """Tokens per second of plain vLLM, of its fp8 cache, and of kv-compress by rate.

    Same prompts, same cache bytes. Plain vLLM, fp8 and kv-compress are engines in processes of
    their own, started once; then the rows take turns, A B C A B C, in rotating order, and every
    ratio is taken inside a round. Only one engine works at a time, the others are stopped. A
    round submits all prompts at once and ends when every request has all its output tokens.
    Prompts are random words, new ones every round, the same for every row. The cache is the same
    for the whole grid: enough for `--hold` requests of the longest prompt at full length.

    * **tokens/s**: prompt and output tokens of a round over its wall time; **x plain**: its ratio
      to plain vLLM in the same round, median and range over the rounds.
    * **decode tokens/s**: tokens generated in steps that compute no prompt token, over those
      steps' time. The last steps of a round, when few requests are left, count.
    * **held**: share of a prompt's tokens that stay. **running**: mean number of requests in a
      decode step. **preempted**: per round, median.

    With several `--prompts` or `--prompt-tokens` it also says from which load on compression
    pays. Decoding gains where attention over the cache, or too few requests at once, is what
    limits it. With short prompts, or a cache that holds all requests anyway, expect 1x or less.

    The verdicts judge ratios, never times: see docs/speed.md. Exit code 1 where one is missed.

    Example: `vllm-kvcompress bench throughput --rates 2 8 --prompts 4 16 --prompt-tokens 512 2048`
    """
    threads = threads or len(os.sched_getaffinity(0))
    points = [Point(p, n) for n in prompt_tokens or [2048] for p in prompts or [16]]
    points = sorted(set(points), key=lambda point: (point.prompt_tokens, point.prompts))
    rows = variants(
        rates or [2, 4, 8, 16], presets or ["kv-compress"], fp8=fp8, off=off, flag_off=flag_off
    )
    baseline = read_baseline(against) if against else None
    longest = max(point.prompt_tokens for point in points) + output_tokens
    spec = EngineSpec(
        model=model,
        cache_blocks=hold * -(-longest // BLOCK_TOKENS),
        max_model_len=longest,
        batched_tokens=batched_tokens,
        max_seqs=min(max_seqs, batched_tokens),
        dtype=dtype,
        load_format=load_format,
        eager=eager,
    )
    work = Workload(0, 0, output_tokens, seed)
    grid = measure(rows, points, spec, work, rounds, threads)

    def crowded(point: Point) -> bool:
        each = -(-(point.prompt_tokens + output_tokens) // BLOCK_TOKENS)
        return point.prompts * each > grid.cache_blocks

    ratios = {
        row.name: {
            point: ratio(samples, row.name, "total")
            for point, samples in grid.samples.items()
            if row.name in samples
        }
        for row in rows
        if row.compresses
    }
    tables = [table(point, rows, grid, output_tokens, rounds) for point in grid.samples]
    tables += crossover.tables(ratios)
    judged = verdicts(grid.samples, rows, crowded, baseline)
    console = terminal()
    show_results(console, tables, judged)
    for line in _same_words(rows, grid):
        console.print(line, highlight=False)

    caption = (
        f"{output_tokens} outputs, cache for {hold} finished requests of the longest prompt "
        f"({grid.cache_bytes / 2**20:.1f} MiB); {threads} thread(s) of {cpu_model()}; median and "
        f"range of {rounds} rounds"
    )
    plots = []
    by_load = len(grid.samples) > 1 and any(ratios.values())
    rates_seen = {row.rate for row in rows for s in grid.samples.values() if row.name in s}
    if len(rates_seen - {None}) > by_load:  # a single rate is all in the picture by load
        plots.append(json.with_suffix(".png"))
        plot(rows, grid, plots[-1], caption)
    if by_load:
        plots.append(json.with_name(f"{json.stem}-crossover.png"))
        crossover.plot(ratios, plots[-1], caption)
    write_report(
        json,
        threads,
        {**asdict(spec), "output_tokens": output_tokens, "rounds": rounds, "seed": seed},
        bench="throughput",
        title="Throughput at the same cache bytes",
        tables=tables,
        plots=plots,
        verdicts=judged,
        refused=grid.refused,
        cache_bytes=grid.cache_bytes,
        points=[_point(point, rows, grid) for point in grid.samples],
    )
    conclude(console, [json, *plots], judged)


def _same_words(rows: Sequence[Variant], grid: Grid) -> list[str]:
    """Whether the rows that compress nothing said what plain vLLM said."""
    lines = []
    for row in rows[1:]:
        ran = [s for s in grid.samples.values() if row.name in s]
        if row.does_plain_work and ran:
            pairs = [p for s in ran for p in zip(s[row.name], s[PLAIN], strict=True)]
            same = sum(a.digest == b.digest for a, b in pairs)
            lines.append(f"{row.name}: output tokens equal plain vLLM's in {same}/{len(pairs)}")
    return lines


def _point(point: Point, rows: Sequence[Variant], grid: Grid) -> dict[str, Any]:
    samples = grid.samples[point]
    return {
        **point._asdict(),
        "rows": {row.name: _row(row, samples) for row in rows if row.name in samples},
    }


def _row(row: Variant, samples: Mapping[str, Sequence[Round]]) -> dict[str, Any]:
    rounds = samples[row.name]
    return {
        "meaning": row.meaning,
        "asks": dict(row.asks),
        "summary": {k: asdict(Summary.of(map(of, rounds))) for k, of in FIGURES.items()},
        "ratio_to_plain": {k: asdict(ratio(samples, row.name, k)) for k in FIGURES},
        "rounds": [
            {k: v for k, v in asdict(r).items() if k not in ("blocks", "running")} for r in rounds
        ],
    }


if __name__ == "__main__":
    app()
