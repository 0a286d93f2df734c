"""Figures in one style: readable on a phone, small on disk."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vllm_kvcompress.bench.errors import BenchError
from vllm_kvcompress.bench.harness import Summary

COLOURS = ["#2f6fb3", "#d2691e", "#3a8f5c", "#8e5bb5", "#b8860b", "#c0392b"]
PLAIN_COLOUR = "#6b7078"
WIDTH, PANEL_HEIGHT, DPI = 7.0, 2.7, 150


def panels(count: int, columns: int = 2, share_y: bool = False) -> tuple[Any, list[Any]]:
    """A figure and `count` axes, row by row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 9.5, "axes.titlesize": 10})
    columns = min(columns, count)
    rows = -(-count // columns)
    figure, grid = pyplot.subplots(
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
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axis = axes.yaxis
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

    from matplotlib import pyplot

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
        pyplot.close(figure)
