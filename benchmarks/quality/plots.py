"""Accuracy over held share, per-task bars, and the needle heat map."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_kvcompress.bench.charts import (
    COLOURS,
    CONTROL_COLOUR,
    DPI,
    WIDTH,
    held_shares,
    legend_below,
    panels,
    pyplot,
)
from vllm_kvcompress.bench.quality.case import Case
from vllm_kvcompress.bench.quality.judge import CONTROL, full_of
from vllm_kvcompress.bench.quality.rows import Cell, Group, Outcome, Row
from vllm_kvcompress.presets import DEFAULT_PRESET

GREY = "#444444"


def accuracy_over_held_share(cells: Sequence[Cell], path: Path) -> bool:
    """A panel per group, a line per policy; False where there is nothing to draw."""
    groups = [g for g in _groups(cells) if any(_line(cells, g, p) for p in _policies(cells))]
    if not groups:
        return False
    figure, grid = panels(len(groups), share_y=True)
    for axes, group in zip(grid, groups, strict=True):
        for policy in _policies(cells):
            if line := _line(cells, group, policy):
                axes.plot(*zip(*line, strict=True), label=_label(policy), **_style(policy, cells))
        full = full_of(cells, group)
        if full is not None and full.scores:
            axes.axhline(full.score, color=GREY, linewidth=1, linestyle=":", label="full cache")
        budgeted = [c for c in cells if c.group == group and c.row.budget]
        held_shares(axes, (c.held_share for c in budgeted if c.held_share))
        axes.set_title(group.title.replace(", question", "\nquestion"))
        axes.set_ylim(-0.03, 1.03)
    grid[0].set_ylabel("mean score")
    legend_below(figure, grid)
    return _save(figure, path)


def bars_per_task(cells: Sequence[Cell], budget: float, path: Path) -> bool:
    """Every task's score under every policy at one budget, beside the full cache's."""
    groups = [g for g in _groups(cells) if any(c.scores for c in cells if c.group == g)]
    policies = [p for p in _policies(cells) if any(_at(cells, g, p, budget) for g in groups)]
    if not policies:
        return False
    height = 0.16 * (len(policies) + 1) + 0.14
    figure, axes = pyplot().subplots(figsize=(WIDTH, max(1.8, height * len(groups) + 0.6)))
    thick = 0.84 / (len(policies) + 1)
    for index, policy in enumerate(["full cache", *policies]):
        found = [full_of(cells, g) if not index else _at(cells, g, policy, budget) for g in groups]
        widths = [cell.score if cell and cell.scores else 0 for cell in found]
        places = [place + index * thick for place in range(len(groups))]
        colour = "#c9ccd1" if not index else _style(policy, cells)["color"]
        axes.barh(places, widths, height=thick * 0.9, color=colour, label=_label(policy))
    axes.set_yticks([p + 0.42 - thick / 2 for p in range(len(groups))], [g.title for g in groups])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.02)
    axes.set_xlabel(f"mean score with about {budget:.3g} of the prompt's cache held")
    axes.spines[["top", "right"]].set_visible(False)
    legend_below(figure, [axes])
    return _save(figure, path)


def heat_map(
    cases: Sequence[Case], rows: Sequence[Row], outcomes: Sequence[Outcome], path: Path
) -> bool:
    """Mean score over length and depth, a panel per row; needs cases that know their depth."""
    seen = [outcome for outcome in outcomes if not outcome.unseen]
    outcomes = seen or outcomes
    placed = {case.key: case for case in cases if case.depth is not None and case.length}
    lengths = sorted({case.length or 0 for case in placed.values()})
    shown = [r for r in rows if any(o.row == r.key and o.case in placed for o in outcomes)]
    if not shown or not lengths:
        return False
    import numpy as np

    bands = np.linspace(0, 1, 11)
    columns = min(2, len(shown))
    lines = -(-len(shown) // columns)
    size = 3.5 * columns + 0.6, (0.9 + 0.32 * len(lengths)) * lines + 0.6
    figure, grid = pyplot().subplots(lines, columns, figsize=size, squeeze=False, sharey=True)
    image = None
    for axes, row in zip(grid.flat, shown, strict=False):
        total, count = np.zeros((2, len(lengths), len(bands) - 1))
        for outcome in outcomes:
            case = placed.get(outcome.case)
            if outcome.row == row.key and case is not None and outcome.held_share is not None:
                assert case.depth is not None and case.length is not None
                band = min(int(case.depth * 10), len(bands) - 2)
                total[lengths.index(case.length), band] += outcome.score
                count[lengths.index(case.length), band] += 1
        mean = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
        image = axes.imshow(mean, aspect="auto", vmin=0, vmax=1, cmap="viridis")
        axes.set_xticks([-0.5, 4.5, 9.5], ["0", "50", "100 %"])
        axes.set_yticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        kept = "" if row.budget is None else f", {row.budget:.3g} held"
        axes.set_title(_label(row.policy) + kept, fontsize=10)
        axes.set_xlabel("depth of the fact")
    for axes in list(grid.flat)[len(shown) :]:
        axes.remove()
    grid[0][0].set_ylabel("prompt tokens")
    figure.tight_layout(rect=(0, 0, 0.92, 1))
    assert image is not None
    figure.colorbar(image, cax=figure.add_axes((0.93, 0.2, 0.015, 0.6))).set_label("mean score")
    return _save(figure, path)


def _groups(cells: Sequence[Cell]) -> list[Group]:
    return list(dict.fromkeys(c.group for c in cells))


def _policies(cells: Sequence[Cell]) -> list[str]:
    return list(dict.fromkeys(c.row.policy for c in cells if c.row.budget is not None))


def _at(cells: Sequence[Cell], group: Group, policy: str, budget: float) -> Cell | None:
    wanted = (group, policy, budget)
    found = [c for c in cells if (c.group, c.row.policy, c.row.budget) == wanted and c.scores]
    return found[0] if found else None


def _line(cells: Sequence[Cell], group: Group, policy: str) -> list[tuple[float, float]]:
    mine = [c for c in cells if (c.group, c.row.policy) == (group, policy) and c.row.budget]
    return sorted((c.held_share, c.score) for c in mine if c.held_share is not None and c.scores)


def _label(policy: str) -> str:
    """Peers without the words that all of them share."""
    press = policy.removeprefix("kvpress:")
    if press == policy:
        return policy
    return press.replace("Press", "").replace("press=", "") + " (kvpress)"


def _style(policy: str, cells: Sequence[Cell]) -> dict[str, Any]:
    policies = _policies(cells)
    ours = policy == DEFAULT_PRESET
    is_peer = any(c.row.kind == "peer" for c in cells if c.row.policy == policy)
    others = [p for p in policies if p not in (DEFAULT_PRESET, CONTROL)]
    colour = COLOURS[0] if ours else CONTROL_COLOUR
    if policy in others:
        colour = COLOURS[1 + others.index(policy) % (len(COLOURS) - 1)]
    return {
        "color": colour,
        "marker": "s" if is_peer else "o",
        "markersize": 5 if ours else 3.5,
        "linewidth": 2.4 if ours else 1.3,
        "linestyle": "--" if is_peer else ":" if policy == CONTROL else "-",
        "zorder": 3 if ours else 2,
    }


def _save(figure: Any, path: Path) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    pyplot().close(figure)
    return True
