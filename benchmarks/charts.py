"""Figures in one style: readable on a phone, small on disk."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vllm_kvcompress.bench.errors import BenchError
from vllm_kvcompress.bench.harness import Summary

COLOURS = [  # what a figure is about comes first
    *("#2f6fb3", "#d2691e", "#3a8f5c", "#8e5bb5", "#b8860b"),
    *("#c0392b", "#d8588f", "#5b7f95", "#8c6d46"),
]
PLAIN_COLOUR = "#6b7078"
CONTROL_COLOUR = "#9a9fa8"
WIDTH, PANEL_HEIGHT, DPI = 7.0, 2.7, 150
TICK_DISTANCE = 1.3  # nearer ones would write over each other
LONG_LABEL = 24  # characters


def pyplot() -> Any:
    """matplotlib's, without a window."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def panels(count: int, columns: int = 2, share_y: bool = False) -> tuple[Any, list[Any]]:
    """A figure and `count` axes, row by row."""
    pyplot().rcParams.update({"font.size": 9.5, "axes.titlesize": 10})
    columns = min(columns, count)
    rows = -(-count // columns)
    figure, grid = pyplot().subplots(
        rows,
        columns,
        figsize=(WIDTH, PANEL_HEIGHT * rows + 0.4),
        squeeze=False,
        sharey=share_y,
    )
    axes = list(grid.flat)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    for unused in axes[count:]:
        unused.set_visible(False)
    return figure, axes[:count]


def log_y(axes: Any) -> None:
    """Make the y axis logarithmic, labelled with whole numbers at 1, 2 and 5."""
    axes.set_yscale("log")
    whole_numbers(axes.yaxis)


def whole_numbers(axis: Any) -> None:
    """Label a logarithmic axis at 1, 2 and 5."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.set_minor_formatter(NullFormatter())


def line_with_range(
    axis: Any, sizes: Sequence[int], sums: Sequence[Summary], colour: str, label: str | None = None
) -> None:
    """A line through the medians, and a band over the ranges."""
    axis.plot(sizes, [s.median for s in sums], "o-", color=colour, label=label, ms=4)
    low, high = [s.low for s in sums], [s.high for s in sums]
    axis.fill_between(sizes, low, high, color=colour, alpha=0.15, linewidth=0)


def held_shares(axis: Any, shares: Iterable[float]) -> None:
    """Make the x axis the share of a prompt's cache that is held, with ticks in per cent."""
    axis.set_xscale("log", base=2)
    ticks: list[float] = []
    for share in sorted(shares):
        if not ticks or share > TICK_DISTANCE * ticks[-1]:
            ticks.append(share)
    axis.set_xticks(ticks, [f"{share:.0%}" for share in ticks])
    axis.minorticks_off()
    axis.set_xlabel("share of the cache held")


def legend_below(figure: Any, axes: Iterable[Any]) -> None:
    """One legend for all axes, in room that is added below them; lays the figure out."""
    labels: dict[str, Any] = {}
    for axis in axes:
        labels.update(dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True)))
    columns = 1 if max(map(len, labels)) > LONG_LABEL else 3
    width, height = figure.get_size_inches()
    below = 0.2 * -(-len(labels) // columns) + 0.1
    figure.set_size_inches(width, height + below)
    figure.legend(
        *(labels.values(), labels.keys()),
        loc="lower center",
        ncols=columns,
        frameon=False,
        fontsize=9,
    )
    figure.tight_layout(rect=(0, below / (height + below), 1, 1))


def log_sizes(axis: Any, sizes: Iterable[int], label: str) -> None:
    """Make the x axis logarithmic, with a tick for every size."""
    sizes = sorted(set(sizes))
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axis.set_xlabel(label)


def save(figure: Any, path: Path, caption: str = "") -> None:
    """Write the figure, with a caption below, and forget it.

    Raises:
        BenchError: with one line, when the file cannot be written.
    """
    import textwrap

    lines = textwrap.wrap(caption, 95)
    height = figure.get_size_inches()[1]
    below = 0.18 * len(lines) / height
    figure.text(0.01, 0.01, "\n".join(lines), fontsize=9, color="#555555", va="bottom")
    figure.tight_layout(rect=(0, below, 1, 1))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI)
    except OSError as error:
        raise BenchError(f"cannot write {path}: {error.strerror}") from None
    finally:
        pyplot().close(figure)
