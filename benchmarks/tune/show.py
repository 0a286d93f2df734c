"""A sweep as a table, a plot and one line of advice."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from torch import Tensor

from vllm_kvcompress.bench.charts import COLOURS, PLAIN_COLOUR, panels, save
from vllm_kvcompress.bench.quality.judge import Pairing
from vllm_kvcompress.bench.quality.rows import Cell
from vllm_kvcompress.bench.table import Table
from vllm_kvcompress.bench.tune.sweeps import Candidate, Sweep

KEPT = 0.98  # of the full cache's score: good enough to be advised


@dataclass(frozen=True)
class Tried:
    """A candidate and what came of it; `against_full` has a pairing for every table of cases."""

    candidate: Candidate
    overlap: float
    against_full: Sequence[Pairing]

    @property
    def score(self) -> float:
        return mean(pairing.ours.score for pairing in self.against_full)

    @property
    def full(self) -> float:
        return mean(pairing.theirs.score for pairing in self.against_full)

    @property
    def good(self) -> bool:
        return self.score >= KEPT * self.full

    def row(self, published: str) -> list[str]:
        better, worse = (
            sum(getattr(pairing, side) for pairing in self.against_full)
            for side in ("better", "worse")
        )
        mark = ", published" if self.candidate.label == published else ""
        return [
            self.candidate.label + mark,
            f"{self.candidate.work:.0%}",
            f"{self.overlap:.0%}",
            f"{100 * self.score:.1f}",
            f"{better} / {worse}",
        ]


def tried(candidate: Candidate, overlaps: Tensor, cells: Sequence[Cell]) -> Tried:
    """`cells`: the candidate's and the full cache's, each table of cases with both."""
    plain = {cell.group: cell for cell in cells if cell.row.kind == "plain"}
    mine = [cell for cell in cells if cell.row.kind == "preset" and cell.scores]
    pairings = [Pairing(cell, plain[cell.group]) for cell in mine]
    return Tried(candidate, candidate.overlap(overlaps), pairings)


def table(sweep: Sweep, found: Sequence[Tried], prompts: int) -> Table:
    full = found[0].full
    held = mean(pairing.ours.held_share or 0.0 for each in found for pairing in each.against_full)
    columns = (sweep.setting, sweep.work_title, "overlap", "score, %", "better / worse than full")
    note = (
        f"{prompts} prompts, the same for every row, {held:.1%} of their cache held; the full "
        f"cache scores {100 * full:.1f}. Overlap: of what the layers it decides for would select, "
        "how much is selected."
    )
    rows = [each.row(sweep.published()) for each in found]
    return Table(f"{sweep.setting} of {sweep.preset.name}", columns, rows, note)


def advised(found: Sequence[Tried]) -> Tried | None:
    """The candidate that saves most of those that are good; None where none is."""
    good = [each for each in found if each.good]
    return min(good, key=lambda each: (each.candidate.work, -each.score), default=None)


def plot(sweep: Sweep, found: Sequence[Tried], overlaps: Tensor, path: Path, caption: str) -> None:
    """How far layers agree, and what each setting leaves of the score."""
    figure, (map_axes, score_axes) = panels(2)
    image = map_axes.imshow(overlaps.numpy(), vmin=0, vmax=1, cmap="Blues", origin="lower")
    figure.colorbar(image, ax=map_axes, shrink=0.8)
    map_axes.set(title="overlap of selections", xlabel="layer", ylabel="selects for it")
    _label_cells(map_axes, overlaps)
    places = range(len(found))
    score_axes.axhline(100 * found[0].full, color=PLAIN_COLOUR, ls=":", label="full cache")
    scores, agree = [100 * t.score for t in found], [100 * t.overlap for t in found]
    score_axes.plot(places, scores, "o-", ms=4, color=COLOURS[0], label="score, %")
    score_axes.plot(places, agree, "s--", ms=3, color=COLOURS[1], label="overlap, %")
    score_axes.set_xticks(places, [t.candidate.label for t in found], fontsize=8)
    score_axes.set(title=sweep.preset.name, xlabel=sweep.setting, ylim=(-3, 104))
    score_axes.legend(frameon=False, fontsize=8)
    save(figure, path, caption)


def _label_cells(axes: Any, overlaps: Tensor, most: int = 10) -> None:
    """Numbers in the map's squares, where there are few."""
    layers = len(overlaps)
    step = -(-layers // most)
    axes.set_xticks(range(0, layers, step))
    axes.set_yticks(range(0, layers, step))
    if step == 1:
        for row, shares in enumerate(overlaps.tolist()):
            for column, share in enumerate(shares):
                colour = "white" if share > 0.6 else "black"
                axes.text(
                    column,
                    row,
                    f"{100 * share:.0f}",
                    ha="center",
                    va="center",
                    color=colour,
                    size=8,
                )
