"""When the first token comes, beside what floating-point operations say."""

import json as jsonlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer

from vllm_kvcompress.bench.charts import (
    COLOURS,
    PLAIN_COLOUR,
    line_with_range,
    log_sizes,
    log_y,
    panels,
    save,
)
from vllm_kvcompress.bench.crossover import Point
from vllm_kvcompress.bench.engine import BLOCK_TOKENS, EngineSpec, Workload, environment
from vllm_kvcompress.bench.errors import BenchError
from vllm_kvcompress.bench.flops import Decoder, Prediction, propagates
from vllm_kvcompress.bench.harness import Summary, Verdict, cpu_model, paired_ratio, write_report
from vllm_kvcompress.bench.options import Dtype, Hidden, ListCommand, Threads, existing_model
from vllm_kvcompress.bench.overhead import COMPRESSION, PROPAGATION, Step, compression_over_rest
from vllm_kvcompress.bench.process import LineProcess, ProcessEnded
from vllm_kvcompress.bench.progress import progress_bar
from vllm_kvcompress.bench.table import Table
from vllm_kvcompress.bench.terminal import conclude, show_results, terminal
from vllm_kvcompress.bench.throughput import Grid, measure
from vllm_kvcompress.bench.variants import COMPRESSING, PLAIN, Variant, variants
from vllm_kvcompress.presets import shipped_presets

SAME_WORK, LONGEST = 0.9, 0.8
OF_PREDICTED, FLAT = 0.95, 0.95
COMPUTE_BOUND_TOKENS = 4096  # predictions are judged from here on
COLUMNS = (
    "prompt tokens",
    "row",
    "held",
    "first token ms",
    "ours ms",
    "x plain",
    "FLOPs say",
    "timed FLOPs say",
)
STOPWATCHES = (sys.executable, "-P", "-m", "vllm_kvcompress.bench.stopwatch_child")

Stopped = Mapping[tuple[int, str], Sequence[Step]]
"""(prompt tokens, row) -> prefills under stopwatches."""


def stopped(
    rows: Sequence[Variant], lengths: Sequence[int], spec: EngineSpec, count: int, threads: int
) -> Stopped:
    """Prefills of the rows that select or compress, in one engine under stopwatches.

    Raises:
        BenchError: the engine ended.
    """
    own = replace(spec, kv_compress=COMPRESSING.kv_compress)
    command = [*STOPWATCHES, jsonlib.dumps(asdict(own))]
    ours = [row for row in rows if row.engine == COMPRESSING and row.preset]
    found: dict[tuple[int, str], list[Step]] = {}
    if not ours or not count:
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
        raise BenchError(str(ended)) from None
    return found


def faster(grid: Grid, point: Point, name: str, than: str = PLAIN) -> Summary:
    """Another row's time to the first token over a row's: above 1 it comes sooner."""
    samples = grid.samples[point]
    return paired_ratio([r.wall_s for r in samples[than]], [r.wall_s for r in samples[name]])


def table(
    rows: Sequence[Variant],
    grid: Grid,
    watched: Stopped,
    prediction: Prediction | None,
    rounds: int,
) -> Table:
    lines = []
    for point, samples in grid.samples.items():
        n = point.prompt_tokens
        for row in rows:
            where = [f"{n:,}", row.name]
            if row.name not in samples:
                lines.append([*where, "refused", *["-"] * (len(COLUMNS) - 3)])
                continue
            steps, ratio = watched.get((n, row.name), ()), faster(grid, point, row.name)
            says: list[float | None] = [None, None]
            if prediction and propagates(row):
                says = [prediction.speed_up(row, n), prediction.timed_speed_up(row, n)]
            lines.append(
                [
                    *where,
                    f"{row.held_share(n, grid.cache_blocks):.1%}",
                    f"{Summary.of(1e3 * r.wall_s for r in samples[row.name]).median:,.1f}",
                    _ours(steps) if steps else "-",
                    ratio.text(2),
                    *(f"{s:.2f} ({ratio.median / s:.0%})" if s else "-" for s in says),
                ]
            )
    refusals = [f"{name}: {reason}" for name, reason in grid.refused.items()]
    return Table(
        "Time to the first token, one prompt at a time",
        COLUMNS,
        lines,
        " ".join(
            [
                f"Medians of {rounds} rounds. ours: selecting, scoring, choosing, copying, and "
                "its share of the rest of the prefill. x plain, with its range: above 1 is sooner. "
                "FLOPs say: plain vLLM's operations over the row's (how much of it was reached); "
                "timed: at the cost of linear layers and of attention in plain vLLM's times here.",
                *refusals,
            ]
        ),
    )


def _ours(steps: Sequence[Step]) -> str:
    labels = COMPRESSION, PROPAGATION
    ours = Summary.of(1e3 * sum(step.seconds.get(one, 0.0) for one in labels) for step in steps)
    return f"{ours.median:.2f} ({Summary.of(map(compression_over_rest, steps)).median:.1%})"


def verdicts(rows: Sequence[Variant], grid: Grid, prediction: Prediction | None) -> list[Verdict]:
    """`off` prompts take plain vLLM's time; the longest compressed ones at most 1.25 times it.

    From `COMPUTE_BOUND_TOKENS` on propagated ones reach what FLOPs say, whatever is evicted.
    """
    found = []
    longest = max(grid.samples)
    for point, samples in grid.samples.items():
        n = point.prompt_tokens
        ran = [row for row in rows if row.name in samples]
        for row in ran:
            what = f"first token, {row.name}, {n:,} tokens"
            if row.does_plain_work:
                found.append(Verdict(what, faster(grid, point, row.name), SAME_WORK))
            elif propagates(row) and prediction and n >= COMPUTE_BOUND_TOKENS:
                target = round(OF_PREDICTED * prediction.speed_up(row, n), 3)
                found.append(Verdict(what, faster(grid, point, row.name), target))
            elif row.compresses and point == longest:
                found.append(Verdict(what, faster(grid, point, row.name), LONGEST))
        if n >= COMPUTE_BOUND_TOKENS:
            for first, other in _same_but_for_the_budget(ran):
                what = f"first token, {other.name} as soon as {first.name}, {n:,} tokens"
                found.append(Verdict(what, faster(grid, point, other.name, first.name), FLAT))
    return found


def _same_but_for_the_budget(rows: Sequence[Variant]) -> Iterator[tuple[Variant, Variant]]:
    """Each propagating row beside the first whose deep layers see as many tokens."""
    first: dict[object, Variant] = {}
    for row in filter(propagates, rows):
        preset = shipped_presets()[str(row.preset)]
        same = first.setdefault((preset.tsp_rate, preset.tsp_tokens, preset.tsp_layer), row)
        if same is not row:
            yield same, row


def plot(
    rows: Sequence[Variant],
    grid: Grid,
    prediction: Prediction | None,
    path: Path,
    caption: str,
) -> None:
    """Time to the first token against the prompt's length, and what is gained and predicted."""
    figure, (times, gains) = panels(2)
    colours = iter([PLAIN_COLOUR, *COLOURS])
    for row in rows:
        points = [p for p, samples in grid.samples.items() if row.name in samples]
        if not points:
            continue
        colour, lengths = next(colours), [p.prompt_tokens for p in points]
        sums = [Summary.of(1e3 * r.wall_s for r in grid.samples[p][row.name]) for p in points]
        line_with_range(times, lengths, sums, colour, row.name)
        line_with_range(gains, lengths, [faster(grid, p, row.name) for p in points], colour)
        if prediction and propagates(row):
            gains.plot(lengths, [prediction.speed_up(row, n) for n in lengths], ":", color=colour)
            by_time = [prediction.timed_speed_up(row, n) for n in lengths]
            if None not in by_time:
                gains.plot(lengths, by_time, "--", color=colour, linewidth=1)
    log_y(times)
    for axis in (times, gains):
        log_sizes(axis, (point.prompt_tokens for point in grid.samples), "prompt tokens")
    times.set_ylabel("ms to the first token")
    gains.set_ylabel("x plain vLLM")
    gains.set_ylim(bottom=0)
    times.legend(frameon=False)
    says = "; dotted: what FLOPs say, dashed: timed FLOPs" if prediction else ""
    save(figure, path, caption + says)


@contextmanager
def _model(
    name: str | None, layers: int, hidden: int, longest: int
) -> Iterator[tuple[str, Decoder | None]]:
    """A model to serve, and its sizes where its operations can be counted."""
    if name is None:
        decoder = Decoder.llama(layers, hidden)
        with decoder.folder(longest) as folder:
            yield folder, decoder
    else:
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise typer.BadParameter(f"cannot read the model {name}: {error}") from None
        yield name, Decoder.of(config)


app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command(cls=ListCommand)
def main(
    prompt_tokens: Annotated[
        list[int] | None,
        typer.Option(help="Tokens per prompt, a list (default 1024 2048 4096).", min=1),
    ] = None,
    rates: Annotated[list[float] | None, typer.Option(help="Rates (default 8).")] = None,
    presets: Annotated[
        list[str] | None,
        typer.Option(help="Presets, each at every rate (default kv-compress fastkv tsp)."),
    ] = None,
    off: Annotated[bool, typer.Option(help="A row with kv-compress on, requests off.")] = True,
    rounds: Annotated[int, typer.Option(help="Measured prompts of every row.", min=1)] = 5,
    stopwatches: Annotated[
        int, typer.Option(help="Prompts of every row under stopwatches; 0: none.", min=0)
    ] = 3,
    threads: Threads = 0,
    cpu_time: Annotated[
        bool,
        typer.Option(
            "--cpu-time", help="CPU seconds of one thread: for a machine with other work."
        ),
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            callback=existing_model,
            help="A model folder or Hugging Face id; default: a Llama of random weights.",
        ),
    ] = None,
    layers: Annotated[int, typer.Option(help="Layers of that Llama.", min=2)] = 8,
    hidden: Hidden = 512,
    dtype: Dtype = "float32",
    eager: Annotated[
        bool, typer.Option("--eager/--compiled", help="Without or with torch.compile.")
    ] = True,
    batched_tokens: Annotated[
        int, typer.Option(help="Token budget of a step: longer prompts go in chunks.", min=32)
    ] = 2048,
    json: Annotated[Path, typer.Option(help="The report; the plot goes beside it.")] = Path(
        "results/prefill.json"
    ),
) -> None:
    """When the first token comes: later by what compression costs, sooner by what is left out.

    Compression follows the prefill, so it costs time there; what it gains comes while decoding
    (`bench throughput`). With `fastkv` and `tsp` the deep layers see selected tokens only, and
    the first token comes sooner. One prompt at a time, in an idle engine; the rows take turns.
    The model is a Llama of random weights, large enough to be bound by computing.

    * **first token ms**: from submitting the prompt to its first token. **x plain**: plain
      vLLM's time over the row's, round by round: 0.95 is 5 % later.
    * **ours ms**: selecting, scoring, choosing and copying, taken with stopwatches in an engine of
      its own afterwards (as `bench overhead` does), and its share of the rest of the prefill.
    * **FLOPs say**: plain vLLM's floating-point operations over the row's: projections, MLP,
      causal attention, the head. **timed FLOPs say**: the same with linear layers and attention
      counted at what each costs here, fitted to plain vLLM's times over the lengths.

    Exit code 1 where `off` prompts take longer than plain vLLM's, the longest compressed ones more
    than 1.25 times as long, or, from 4,096 tokens on, propagated ones gain less than 95 % of what
    FLOPs say or not the same at every budget of the cache.

    Example: `vllm-kvcompress bench prefill --prompt-tokens 1024 4096 --presets fastkv tsp`
    """
    threads = 1 if cpu_time else threads or len(os.sched_getaffinity(0))
    lengths = sorted(set(prompt_tokens or [1024, 2048, 4096]))
    rows = variants(rates or [8], presets or ["kv-compress", "fastkv", "tsp"], fp8=False, off=off)
    with _model(model, layers, hidden, lengths[-1] + 1) as (folder, decoder):
        spec = EngineSpec(
            model=folder,
            cache_blocks=3 * -(-(lengths[-1] + 1) // BLOCK_TOKENS),
            max_model_len=lengths[-1] + 1,
            batched_tokens=batched_tokens,
            max_seqs=min(16, batched_tokens),
            dtype=dtype,
            load_format="auto" if model else "dummy",
            eager=eager,
        )
        points = [Point(1, length) for length in lengths]
        grid = measure(rows, points, spec, Workload(0, 0, 1), rounds, threads)
        if cpu_time:
            for samples in grid.samples.values():
                for done in chain.from_iterable(samples.values()):
                    done.wall_s = done.cpu_s
        measured = [point.prompt_tokens for point in grid.samples]
        watched = stopped(rows, measured, spec, stopwatches, threads)

    prediction = None
    if decoder is not None:
        plain_s = {
            point.prompt_tokens: Summary.of(r.wall_s for r in samples[PLAIN]).median
            for point, samples in grid.samples.items()
        }
        prediction = Prediction.of(decoder, plain_s)
    shown = table(rows, grid, watched, prediction, rounds)
    judged = verdicts(rows, grid, prediction)
    console = terminal()
    show_results(console, [shown], judged)
    picture = json.with_suffix(".png")
    of = model or f"a Llama of {layers} layers of width {hidden}, random weights"
    caption = (
        f"{of}, {'eager' if eager else 'compiled'}; {'CPU time of ' if cpu_time else ''}"
        f"{threads} thread(s) of {cpu_model()}; median and range of {rounds} rounds"
    )
    plot(rows, grid, prediction, picture, caption)
    write_report(
        json,
        threads,
        {
            **asdict(spec),
            "model": of,
            "rounds": rounds,
            "cpu_time": cpu_time,
            "decoder": asdict(decoder) if decoder else None,
        },
        bench="prefill",
        title="Time to the first token",
        tables=[shown],
        plots=[picture],
        verdicts=judged,
        refused=grid.refused,
        seconds_per_flop=asdict(prediction.cost) if prediction and prediction.cost else None,
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
    conclude(console, [json, picture], judged)


if __name__ == "__main__":
    app()
