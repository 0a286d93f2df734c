"""Tokens per second of plain vLLM and of this project, in the same cache, in one run.

python benchmarks/throughput.py --rates 1 8 --json throughput.json --plot throughput.png
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from vllm_kvcompress.bench.child import Child
from vllm_kvcompress.bench.engine import BLOCK_TOKENS, MODEL, EngineSpec, Round, Workload
from vllm_kvcompress.bench.harness import (
    Summary,
    Verdict,
    cpu_model,
    paired_ratio,
    write_report,
)
from vllm_kvcompress.bench.options import ListCommand

PLAIN, FLAG_OFF, OFF, CONTINUAL = "plain vLLM", "flag off", "off", "continual"
REPORT_WIDTH = 110


@dataclass(frozen=True)
class Variant:
    """A row of the table: an engine, with `kv_compress` as its setting."""

    name: str
    meaning: str
    kv_compress: Mapping[str, Any] | None = None
    plugin: bool = True
    rate: float | None = None


@dataclass(frozen=True)
class Figure:
    """A number of a round."""

    title: str
    of: Callable[[Round], float]


FIGURES = {
    "total": Figure("tokens/s", lambda r: r.total_per_s),
    "decode": Figure("decode tokens/s", lambda r: r.decode_per_s),
    "total_cpu": Figure(
        "tokens per CPU s", lambda r: (r.prompt_tokens + r.output_tokens) / r.cpu_s
    ),
    "decode_cpu": Figure("decode tokens per CPU s", lambda r: r.decode_tokens / r.decode_cpu_s),
}


def variants(rates: Sequence[float]) -> list[Variant]:
    rows = [
        Variant(PLAIN, "no plugin loaded", plugin=False),
        Variant(FLAG_OFF, "plugin installed, kv-compress not asked for"),
        Variant(OFF, "kv-compress on, every request off", {"preset": "off"}),
    ]
    for rate in rates:
        if rate == 1:
            forced = {"rate": 1, "test_force_arena": True}
            rows.append(Variant("rate 1", "everything kept, through an arena", forced, rate=1))
        else:
            rows.append(Variant(f"rate {rate:g}", "kv-compress", {"rate": rate}, rate=rate))
    again = {"preset": "kv-compress-continual"}
    return [*rows, Variant(CONTINUAL, "kv-compress-continual at rate 8", again, rate=8)]


def targets(samples: Mapping[str, Sequence[Round]]) -> list[Verdict]:
    """What the project promises of each variant that ran, against what was measured."""
    promised = [
        (FLAG_OFF, "total", 0.99),
        (OFF, "total", 0.97),
        ("rate 8", "total", 1.5),
        ("rate 8", "decode", 3.0),
        (CONTINUAL, "decode", 4.0),
    ]
    return [
        Verdict(f"{name}, {FIGURES[key].title}", ratio(samples, name, key), at_least)
        for name, key, at_least in promised
        if name in samples and PLAIN in samples
    ]


def ratio(samples: Mapping[str, Sequence[Round]], name: str, key: str) -> Summary:
    """A variant's figure over plain vLLM's, paired round by round."""
    of = FIGURES[key].of
    return paired_ratio([of(r) for r in samples[name]], [of(r) for r in samples[PLAIN]])


def measure(
    rows: Sequence[Variant], spec: EngineSpec, work: Workload, rounds: int, threads: int
) -> dict[str, list[Round]]:
    """Rounds of every variant, taking turns; the first of each warms up and does not count."""
    samples: dict[str, list[Round]] = {row.name: [] for row in rows}
    with ExitStack() as stack, Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("starting engines", total=len(rows) * (rounds + 2))
        children = []
        for row in rows:
            own = EngineSpec(**{**asdict(spec), "kv_compress": row.kv_compress})
            children.append(stack.enter_context(Child(row.name, own, threads, row.plugin)))
            progress.advance(bar)
        for number in range(-1, rounds):
            turn = number % len(children)
            for child in children[turn:] + children[:turn]:
                label = f"round {number + 1}/{rounds}" if number >= 0 else "warm-up"
                progress.update(bar, description=f"{label}: {child.name}")
                seeded = Workload(**{**asdict(work), "seed": work.seed + number})
                done = child.run(seeded)
                if number >= 0:
                    samples[child.name].append(done)
                progress.advance(bar)
    return samples


def table(rows: Sequence[Variant], samples: Mapping[str, Sequence[Round]], key: str) -> Table:
    """One figure of every variant: median, range, and the ratio to plain vLLM."""
    out = Table(title=FIGURES[key].title)
    out.add_column("variant", no_wrap=True)
    for title in ("running", "preempted", "blocks", "median", "range", "CPU x", "x", "x range"):
        out.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        rounds = samples[row.name]
        figure = Summary.of(FIGURES[key].of(r) for r in rounds)
        times = ratio(samples, row.name, key)
        out.add_row(
            row.name,
            f"{Summary.of(r.mean_running for r in rounds).median:.1f}",
            f"{Summary.of(r.preemptions for r in rounds).median:g}",
            f"{max(r.peak_blocks for r in rounds)}",
            f"{figure.median:,.0f}",
            f"{figure.low:,.0f}-{figure.high:,.0f}",
            f"{ratio(samples, row.name, key + '_cpu').median:.2f}",
            f"{times.median:.2f}",
            f"{times.low:.2f}-{times.high:.2f}",
        )
    return out


def plot(
    rows: Sequence[Variant], samples: Mapping[str, Sequence[Round]], path: Path, caption: str
) -> None:
    """Tokens per second of every variant, in all and while decoding."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [row.name for row in rows]
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.8), sharey=True)
    for axes, key in zip(panels, ("total", "decode"), strict=True):
        sums = [Summary.of(FIGURES[key].of(r) for r in samples[name]) for name in names]
        middle = [s.median for s in sums]
        spread = [[s.median - s.low for s in sums], [s.high - s.median for s in sums]]
        colours = ["#8a8f98" if row.rate in (None, 1) else "#2f6fb3" for row in rows]
        axes.barh(names, middle, xerr=spread, color=colours, height=0.66, ecolor="#444444")
        axes.axvline(middle[0], color="#444444", linewidth=1, linestyle=":")
        for place, (name, value, high) in enumerate(
            zip(names, middle, (s.high for s in sums), strict=True)
        ):
            times = ratio(samples, name, key).median
            axes.annotate(
                f"{times:.2f}x",
                (max(high, value), place),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )
        axes.set_title("prompt and output tokens/s" if key == "total" else "decode tokens/s")
        axes.set_xlim(0, max(s.high for s in sums) * 1.18)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    figure.text(0.01, 0.01, caption, fontsize=7.5, color="#555555")
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command(cls=ListCommand)
def main(
    rates: Annotated[
        list[float] | None,
        typer.Option(help="Compression rates: `--rates 1 8`. 1 forces everything through arenas."),
    ] = None,
    prompts: Annotated[int, typer.Option(help="Requests per round, submitted at once.")] = 16,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens per prompt.")] = 2048,
    output_tokens: Annotated[int, typer.Option(help="Tokens generated per request.")] = 512,
    hold: Annotated[int, typer.Option(help="Finished requests the cache holds uncompressed.")] = 4,
    rounds: Annotated[int, typer.Option(help="Measured rounds of each variant.", min=1)] = 5,
    threads: Annotated[int, typer.Option(help="OpenMP threads; 0 for all cores.")] = 0,
    only: Annotated[
        list[str] | None, typer.Option(help="Run only these rows (plain vLLM always runs).")
    ] = None,
    model: Annotated[str, typer.Option(help="A model folder or name.")] = str(MODEL),
    dtype: Annotated[str, typer.Option(help="As vLLM's `--dtype`.")] = "float32",
    load_format: Annotated[
        str, typer.Option(help="As vLLM's; `dummy` gives a model random weights.")
    ] = "auto",
    eager: Annotated[
        bool, typer.Option(help="Without torch.compile, which is on as in `vllm serve`.")
    ] = False,
    batched_tokens: Annotated[int, typer.Option(help="Token budget of a step.")] = 2048,
    max_seqs: Annotated[int, typer.Option(help="Most requests at once, as vLLM's.")] = 128,
    seed: Annotated[int, typer.Option(help="Round r uses prompts of seed + r.")] = 0,
    json: Annotated[Path | None, typer.Option(help="Write all samples there.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Write a PNG there.")] = None,
) -> None:
    """Tokens per second of plain vLLM and of kv-compress: same prompts, same cache bytes.

    Every variant is an engine in a process of its own, all started once; then they take turns,
    one round each, in rotating order. Only one works at a time, the others are stopped. A round
    submits all prompts at once and ends when every request has all its output tokens. Prompts
    are random words, new ones every round, the same for all variants; the cache has the same
    number of equal blocks everywhere, enough for `--hold` requests at full length.

    * **tokens/s**: prompt and output tokens of a round over its wall time.
    * **decode tokens/s**: over the steps that compute no prompt token, the tokens generated in
      them per second of wall time. The last steps of a round, when few requests are left, count.
    * **x**: the ratio to plain vLLM in the same round; median and range over the rounds.
      **CPU x** is the same ratio per second of CPU time, which other programs disturb less.
    * **running**: mean number of requests in a decode step. **preempted**: per round, median.

    Decoding gains where attention over the cache, or too few requests at once, is what limits
    it. With short prompts, or a cache that holds all requests anyway, expect 1x or a little less.
    """
    import os

    threads = threads or len(os.sched_getaffinity(0))
    wanted = [v for v in variants(rates or [1, 8]) if not only or v.name in [PLAIN, *only]]
    per_request = -(-(prompt_tokens + output_tokens) // BLOCK_TOKENS)
    spec = EngineSpec(
        model=model,
        cache_blocks=hold * per_request,
        max_model_len=prompt_tokens + output_tokens,
        batched_tokens=batched_tokens,
        max_seqs=max_seqs,
        dtype=dtype,
        load_format=load_format,
        eager=eager,
    )
    work = Workload(prompts, prompt_tokens, output_tokens, seed)
    parameters = {k: v for k, v in locals().items() if k in _REPORTED}
    samples = measure(wanted, spec, work, rounds, threads)
    verdicts = targets(samples)
    console = Console(width=None if sys.stdout.isatty() else REPORT_WIDTH)
    for key in ("total", "decode"):
        console.print(table(wanted, samples, key))
    for row in wanted[1:]:
        if row.kv_compress is None or row.name == OFF:
            pairs = zip(samples[row.name], samples[PLAIN], strict=True)
            same = all(a.digest == b.digest for a, b in pairs)
            console.print(f"{row.name}: output tokens {'equal' if same else 'DIFFER from'} plain's")
    for verdict in verdicts:
        console.print(verdict.text(), highlight=False)
    if json:
        results = {
            "rows": {row.name: _row(row, samples) for row in wanted},
            "verdicts": [{**asdict(v), "met": v.met} for v in verdicts],
        }
        write_report(json, threads, {**parameters, **asdict(spec)}, **results)
    if plot_file:
        caption = (
            f"{prompts} prompts of {prompt_tokens} tokens, {output_tokens} outputs, cache for "
            f"{hold} of them uncompressed; {threads} thread(s) of {cpu_model()}; median and range "
            f"of {rounds} rounds"
        )
        plot(wanted, samples, plot_file, caption)


_REPORTED = {"rates", "prompts", "prompt_tokens", "output_tokens", "hold", "rounds", "seed"}


def _row(row: Variant, samples: Mapping[str, Sequence[Round]]) -> dict[str, Any]:
    rounds = samples[row.name]
    return {
        "meaning": row.meaning,
        "kv_compress": row.kv_compress,
        "summary": {k: asdict(Summary.of(f.of(r) for r in rounds)) for k, f in FIGURES.items()},
        "ratio_to_plain": {k: asdict(ratio(samples, row.name, k)) for k in FIGURES},
        "rounds": [
            {k: v for k, v in asdict(r).items() if k not in ("blocks", "running")} for r in rounds
        ],
    }


if __name__ == "__main__":
    app()
