"""Tables, verdicts and the plot of `bench serve`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from vllm_kvcompress.bench.charts import COLOURS, PLAIN_COLOUR, panels, save
from vllm_kvcompress.bench.harness import Summary, Verdict, paired_ratio
from vllm_kvcompress.bench.serve_client import Load, Run
from vllm_kvcompress.bench.table import Table
from vllm_kvcompress.bench.variants import PLAIN, Variant

SAME_WORK, NEVER_BELOW = 0.8, 0.5
TOKENS = "total_token_throughput"

Samples = Mapping[float, Mapping[str, Sequence[Run]]]
"""Request rate -> row -> runs."""


def ratio(runs: Mapping[str, Sequence[Run]], name: str, figure: str) -> Summary:
    """A row's figure over that of the first row, round by round."""
    first = next(iter(runs))
    return paired_ratio([r[figure] for r in runs[name]], [r[figure] for r in runs[first]])


def _middle(runs: Sequence[Run], figure: str, digits: int) -> str:
    value = Summary.of(r[figure] for r in runs).median
    return "-" if value != value else f"{value:,.{digits}f}"


def tables(
    rows: Sequence[Variant], samples: Samples, load: Load, refused: Mapping[str, str], rounds: int
) -> list[Table]:
    """Throughput and latency at every request rate, the first row's ratio last."""
    out = []
    for rate, runs in samples.items():
        baseline = next(iter(runs))
        last = "x plain" if baseline == PLAIN else f"x {baseline}"
        where = f"{load.prompts} requests, {_rate(rate)}: {load.prompt_tokens:,} prompt tokens"
        shown = [row.name for row in rows]
        note = f"Medians of {rounds} rounds, the last column with its range."
        if not load.goodput:
            note += " goodput: give --goodput ttft:MS tpot:MS."
        throughput = [
            [
                name,
                _share(runs[name]),
                f"{Summary.of(r.blocks_freed for r in runs[name]).median:g}",
                _middle(runs[name], "request_throughput", 2),
                _middle(runs[name], "request_goodput", 2),
                _middle(runs[name], "output_throughput", 0),
                _middle(runs[name], TOKENS, 0),
                ratio(runs, name, TOKENS).text(2),
            ]
            if name in runs
            else [name, "refused", *["-"] * 6]
            for name in shown
        ]
        latency = [
            [
                name,
                *(
                    _middle(runs[name], f"{part}_{kind}_ms", 1)
                    for kind in ("ttft", "tpot", "itl")
                    for part in ("median", "p99")
                ),
                ratio(runs, name, "median_ttft_ms").text(2),
                ratio(runs, name, "median_tpot_ms").text(2),
            ]
            if name in runs
            else [name, "refused", *["-"] * 7]
            for name in shown
        ]
        reasons = " ".join(f"{name}: {reason}" for name, reason in refused.items())
        out.append(
            Table(
                f"Throughput, {where}, {load.output_tokens} outputs each",
                ["row", "held", "freed", "req/s", "goodput", "out tok/s", "tok/s", last],
                throughput,
                f"{note} freed: cache blocks per round. {reasons}".strip(),
            )
        )
        out.append(
            Table(
                f"Latency in ms, {where}, {load.output_tokens} outputs each",
                [
                    "row",
                    *("TTFT", "p99", "TPOT", "p99", "ITL", "p99"),
                    f"TTFT {last}",
                    f"TPOT {last}",
                ],
                latency,
                "Median and 99th percentile of a round, medians over the rounds; x: over the "
                "first row's, below 1 is faster.",
            )
        )
    return out


def _share(runs: Sequence[Run]) -> str:
    shares = [r.held_share for r in runs if r.held_share is not None]
    return f"{Summary.of(shares).median:.1%}" if shares else "100.0%"


def _rate(rate: float) -> str:
    return "all at once" if rate == float("inf") else f"{rate:g} per second"


def verdicts(rows: Sequence[Variant], samples: Samples) -> list[Verdict]:
    """Rows that do the first row's work: 0.8 of its tokens/s. Ours otherwise: never below half."""
    found = []
    for rate, runs in samples.items():
        for row in rows[1:]:
            if row.name in runs and row.engine.plugin:
                target = SAME_WORK if row.does_plain_work else NEVER_BELOW
                what = f"{row.name}, {_rate(rate)}, tokens/s"
                found.append(Verdict(what, ratio(runs, row.name, TOKENS), target))
    return found


PANELS = {
    TOKENS: "tokens/s",
    "request_throughput": "requests/s",
    "median_ttft_ms": "TTFT, ms",
    "median_tpot_ms": "TPOT, ms",
}


def plot(samples: Samples, path: Path, caption: str) -> None:
    """Four figures: over the request rate where there are several, else a bar per row."""
    figure, axes = panels(len(PANELS))
    names = list(next(iter(samples.values())))
    colours = [PLAIN_COLOUR, *COLOURS * len(names)]
    for axis, (key, title) in zip(axes, PANELS.items(), strict=True):
        for place, (name, colour) in enumerate(zip(names, colours, strict=False)):
            sums = [Summary.of(r[key] for r in runs[name]) for runs in samples.values()]
            middle = [s.median for s in sums]
            spread = [[s.median - s.low for s in sums], [s.high - s.median for s in sums]]
            if len(samples) == 1:
                axis.barh(place, middle, xerr=spread, color=colour, height=0.66, ecolor="#444444")
            else:
                ticks = range(len(samples))
                style = {"fmt": "o-", "capsize": 2, "markersize": 4, "label": name}
                axis.errorbar(ticks, middle, spread, color=colour, **style)
        if len(samples) == 1:
            axis.set_yticks(range(len(names)), names)
            axis.invert_yaxis()
        else:
            axis.set_xticks(range(len(samples)), [f"{rate:g}" for rate in samples])
            axis.set_xlabel("requests per second")
            axis.set_ylim(bottom=0)
        axis.set_title(title)
    if len(samples) > 1:
        axes[0].legend(frameon=False)
    save(figure, path, caption)
