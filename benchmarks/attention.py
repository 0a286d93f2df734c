"""Decode attention alone: head by head over arenas, against dense attention, in the same kernel."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import typer

from vllm_kvcompress.bench.attention_step import (
    SHAPES,
    Attention,
    Cache,
    Point,
    Shape,
    gib,
    load_kernels,
)
from vllm_kvcompress.bench.charts import COLOURS, PLAIN_COLOUR, log_y, panels, save
from vllm_kvcompress.bench.engine import BLOCK_TOKENS, prepare
from vllm_kvcompress.bench.harness import Summary, Verdict, cpu_model, paired_ratio, write_report
from vllm_kvcompress.bench.options import MOST_SEED, ListCommand, Threads
from vllm_kvcompress.bench.progress import progress_bar
from vllm_kvcompress.bench.table import Table
from vllm_kvcompress.bench.terminal import conclude, show_results, terminal

DENSE = "dense"
AS_MANY = 0.5
COLUMNS = ("requests x tokens", "rate", "KVs", "us", "GB/s", "dense us", "x dense", "x plain")


def measure(
    ways: Mapping[str, Attention], repeats: int, least_s: float, tell: Callable[[], Any]
) -> dict[str, list[float]]:
    """Seconds of a step of each way, which take turns; the first turn warms up."""
    samples: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    often = dict.fromkeys(names, 1)
    for repeat in range(-1, repeats):
        turn = repeat % len(names)
        for name in [*names[turn:], *names[:turn]]:
            step, times = ways[name].step, often[name]
            began = perf_counter()
            for _ in range(times):
                step()
            seconds = (perf_counter() - began) / times
            if repeat >= 0:
                samples[name].append(seconds)
            else:
                often[name] = max(1, min(1000, ceil(least_s / seconds)))
        tell()
    return samples


def ways_at(cache: Cache, rates: Sequence[float]) -> dict[str, Attention]:
    """Plain vLLM; then each rate head by head, and dense over as many tokens."""
    ways = {DENSE: cache.dense(cache.full_blocks * BLOCK_TOKENS)}
    for rate in rates:
        ways[f"{rate:g}"] = cache.per_head(rate)
        ways[f"{DENSE} {rate:g}"] = cache.dense(cache.arena_blocks(rate) * BLOCK_TOKENS)
    return ways


@dataclass(frozen=True)
class Measured:
    """The samples at one point, and what each way reads."""

    point: Point
    samples: Mapping[str, Sequence[float]]
    kvs: Mapping[str, float]

    def rates(self) -> list[str]:
        return [name for name in self.samples if not name.startswith(DENSE)]

    def layer_us(self, name: str, shape: Shape) -> float:
        return Summary.of(self.samples[name]).median / shape.layers * 1e6

    def gb_per_s(self, name: str, shape: Shape) -> float:
        return self.kvs[name] * shape.bytes_per_kv / self.layer_us(name, shape) / 1e3

    def faster(self, name: str, than: str) -> Summary:
        return paired_ratio(self.samples[than], self.samples[name])


def table(shape: Shape, measured: Sequence[Measured], repeats: int) -> Table:
    rows = []
    for at in measured:
        where, us = at.point.text(), f"{at.layer_us(DENSE, shape):,.0f}"
        per_head = at.point.requests * shape.kv_heads
        whole = f"{at.kvs[DENSE] / per_head:,.0f}"
        rows.append(
            [where, "plain", whole, us, f"{at.gb_per_s(DENSE, shape):.1f}", us, "1.00", "1.00"]
        )
        for rate in at.rates():
            as_many = f"{DENSE} {rate}"
            rows.append(
                [
                    where,
                    rate,
                    f"{at.kvs[rate] / per_head:,.0f}",
                    f"{at.layer_us(rate, shape):,.0f}",
                    f"{at.gb_per_s(rate, shape):.1f}",
                    f"{at.layer_us(as_many, shape):,.0f}",
                    f"{at.faster(rate, as_many).median:.2f}",
                    at.faster(rate, DENSE).text(2),
                ]
            )
    return Table(
        f"Decode attention at {shape.title}",
        COLUMNS,
        rows,
        f"Per layer; {shape.kv_heads} KV heads of {shape.group} queries, {shape.head_size} wide, "
        f"{shape.dtype}. KVs: tokens per head, on average. dense: vLLM's attention over as many. "
        f"Median of {repeats} turns, the last column with its range.",
    )


def plot(results: Mapping[str, Sequence[Measured]], path: Path, caption: str) -> None:
    """Microseconds per layer against the tokens, a panel per shape and number of requests."""
    pairs = [
        (SHAPES[name], requests, [at for at in measured if at.point.requests == requests])
        for name, measured in results.items()
        for requests in sorted({at.point.requests for at in measured})
    ]
    figure, axes = panels(len(pairs))
    for axis, (shape, requests, line) in zip(axes, pairs, strict=True):
        tokens = [at.point.tokens for at in line]
        for rate, colour in zip([DENSE, *line[0].rates()], [PLAIN_COLOUR, *COLOURS], strict=False):
            label = "plain vLLM" if rate == DENSE else f"rate {rate}"
            us = [at.layer_us(rate, shape) for at in line]
            axis.plot(tokens, us, "o-", color=colour, label=label, markersize=4)
        axis.set_xscale("log", base=2)
        log_y(axis)
        axis.set_xticks(tokens, [f"{n:,}" for n in tokens])
        axis.set_xlabel("tokens of context")
        axis.set_ylabel("us per layer")
        axis.set_title(f"{shape.name}, {requests} at once")
    axes[0].legend(frameon=False)
    save(figure, path, caption)


def verdicts(results: Mapping[str, Sequence[Measured]]) -> list[Verdict]:
    """At the largest point: reading head by head takes at most twice what dense takes."""
    found = []
    for name, measured in results.items():
        at = max(measured, key=lambda other: (other.point.tokens, other.point.requests))
        for rate in at.rates():
            what = f"{name}, {at.point.text()}, rate {rate}, dense over per head"
            found.append(Verdict(what, at.faster(rate, f"{DENSE} {rate}"), AS_MANY))
    return found


app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command(cls=ListCommand)
def main(
    shapes: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(SHAPES)} (default: all).")
    ] = None,
    requests: Annotated[
        list[int] | None, typer.Option(help="Requests in a step (default 1 8 32).", min=1)
    ] = None,
    tokens: Annotated[
        list[int] | None, typer.Option(help="Tokens of context (default 1024 4096).", min=32)
    ] = None,
    rates: Annotated[
        list[float] | None, typer.Option(help="Compression rates (default 1 2 8).", min=1)
    ] = None,
    spread: Annotated[
        float, typer.Option(help="How uneven the heads are: sigma of log pages.", min=0, max=4)
    ] = 1.0,
    repeats: Annotated[int, typer.Option(help="Measured turns of each.", min=1)] = 9,
    least_ms: Annotated[
        float, typer.Option(help="A turn takes at least so long.", min=0, max=60_000)
    ] = 20,
    memory_gib: Annotated[
        float, typer.Option(help="Points whose cache is larger are left out.", min=0.01)
    ] = 4,
    threads: Threads = 0,
    seed: Annotated[
        int, typer.Option(help="Of keys, values, blocks and pages.", min=0, max=MOST_SEED)
    ] = 0,
    json: Annotated[Path, typer.Option(help="The report; the plot goes beside it.")] = Path(
        "results/attention.json"
    ),
) -> None:
    """What attention itself costs when every head reads pages of its own. CPU only.

    No engine: vLLM's CPU kernel is called as a decode step calls it, one new token per request,
    all layers, on random keys and values in scattered blocks.

    * **plain**: dense attention over the whole context. **x plain**: what a compressed step gains.
    * **dense us**: dense attention over *as many* tokens as the heads keep on average.
      **x dense**: that time over ours. 1.00 means that reading unevenly, head by head, is free.
    * **us** per layer, with what each way must prepare for the kernel in every step (plain vLLM
      once a step, ours once a layer). **GB/s**: keys and values read over that time.

    Pages are dealt out to the heads by log-normal weights (`--spread`). Contexts that fit a cache
    level, or steps of few requests, are bound by fixed costs: expect less than the rate there.

    Example: `vllm-kvcompress bench attention --shapes 8b --requests 1 8 --tokens 8192 --rates 2 8`
    """
    threads = threads or len(os.sched_getaffinity(0))
    prepare(threads)
    chosen = shapes or list(SHAPES)
    for name in chosen:
        if name not in SHAPES:
            raise typer.BadParameter(f"{name!r} is no shape; there are {', '.join(SHAPES)}")
    points = [
        Point(r, n // BLOCK_TOKENS * BLOCK_TOKENS)
        for r in sorted(set(requests or [1, 8, 32]))
        for n in sorted(set(tokens or [1024, 4096]))
    ]
    wanted = sorted(set(rates or [1, 2, 8]))
    console = terminal()
    todo = []
    for name in chosen:
        for point in points:
            needed = gib(SHAPES[name], point)
            if needed <= memory_gib:
                todo.append((name, point))
            else:
                shown = f"{name}, {point.text()}: left out, its cache takes {needed:.1f} GiB"
                console.print(shown, highlight=False)
    if not todo:
        raise typer.BadParameter("every point needs more memory than --memory-gib allows")
    load_kernels()
    results: dict[str, list[Measured]] = {}
    with progress_bar() as progress:
        bar = progress.add_task("", total=len(todo) * (repeats + 1))
        for name, point in todo:
            progress.update(bar, description=f"{name}, {point.text()}")
            ways = ways_at(Cache(SHAPES[name], point, spread, seed), wanted)
            samples = measure(ways, repeats, least_ms / 1e3, lambda: progress.advance(bar))
            kvs = {way: attention.kvs for way, attention in ways.items()}
            results.setdefault(name, []).append(Measured(point, samples, kvs))
    tables = [table(SHAPES[name], measured, repeats) for name, measured in results.items()]
    judged = verdicts(results)
    show_results(console, tables, judged)
    caption = f"{threads} thread(s) of {cpu_model()}; median of {repeats} turns"
    picture = json.with_suffix(".png")
    plot(results, picture, caption)
    write_report(
        json,
        threads,
        {"rates": wanted, "spread": spread, "repeats": repeats, "seed": seed},
        bench="attention",
        title="Decode attention, head by head and dense",
        tables=tables,
        plots=[picture],
        verdicts=judged,
        shapes={name: asdict(SHAPES[name]) for name in results},
        points={
            name: [{**at.point._asdict(), "kvs": at.kvs, "seconds": at.samples} for at in measured]
            for name, measured in results.items()
        },
    )
    conclude(console, [json, picture], judged)


if __name__ == "__main__":
    app()
