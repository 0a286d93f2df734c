"""Paired comparisons, and verdicts on what a policy promises."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from statistics import mean

from vllm_kvcompress.bench.harness import Summary, Verdict
from vllm_kvcompress.bench.quality.rows import Cell, Group
from vllm_kvcompress.presets import DEFAULT_PRESET

PROMISED = {0.5: 0.99, 0.25: 0.98, 0.125: 0.97}
PROMISED_TASKS = ("needle",)
USABLE = 0.5  # of the full cache's score, at the largest budget
CONTROL = "random"
CHANCE = 0.05  # a difference more likely than that is none


@dataclass(frozen=True)
class Pairing:
    """Cases that two rows share; `p` of the two-sided sign test on those that differ."""

    ours: Cell
    theirs: Cell

    @property
    def better(self) -> int:
        return sum(a > b for a, b in self._pairs())

    @property
    def worse(self) -> int:
        return sum(a < b for a, b in self._pairs())

    @property
    def gain(self) -> float:
        return mean(a - b for a, b in self._pairs())

    @property
    def p(self) -> float:
        differing = self.better + self.worse
        tail = sum(comb(differing, k) for k in range(min(self.better, self.worse) + 1))
        return min(1.0, 2 * tail / 2**differing)

    def _pairs(self) -> list[tuple[float, float]]:
        ours, theirs = self.ours.scores, self.theirs.scores
        return [(ours[case], theirs[case]) for case in ours if case in theirs]


def full_of(cells: Sequence[Cell], group: Group) -> Cell | None:
    """The full cache's cell of a group."""
    return next((c for c in cells if c.group == group and c.row.kind == "plain"), None)


def pairings(cells: Sequence[Cell], policy: str = DEFAULT_PRESET) -> list[Pairing]:
    """A policy against every other row of its group and budget that has a number."""
    measured = [c for c in cells if c.scores and c.row.budget is not None]
    return [
        Pairing(ours, theirs)
        for ours in measured
        if ours.row.policy == policy
        for theirs in measured
        if theirs.row.policy != policy
        and (theirs.group, theirs.row.budget) == (ours.group, ours.row.budget)
        and theirs.scores.keys() & ours.scores.keys()
    ]


def verdicts(cells: Sequence[Cell]) -> list[Verdict]:
    """What is promised of every policy, of the default one, and of it against peers."""
    out = []
    for group in dict.fromkeys(c.group for c in cells):
        full = full_of(cells, group)
        if full is None or not any(full.scores.values()):
            continue
        here = [c for c in cells if c.group == group and c.scores and c.row.kind == "preset"]
        out += _usable(here, full)
        out += _promised(here, full)
    return out + _against_peers(cells)


def _usable(cells: Sequence[Cell], full: Cell) -> list[Verdict]:
    largest: dict[str, Cell] = {}
    for cell in cells:
        if cell.row.policy != CONTROL:
            best = largest.setdefault(cell.row.policy, cell)
            if (cell.row.budget or 0) > (best.row.budget or 0):
                largest[cell.row.policy] = cell
    return [
        Verdict(f"{cell.group.title}: {cell.row.key} of full", _exactly(cell.of(full)), USABLE)
        for cell in largest.values()
    ]


def _promised(cells: Sequence[Cell], full: Cell) -> list[Verdict]:
    return [
        Verdict(_of_full(cell), _exactly(cell.of(full)), PROMISED[cell.row.budget])
        for cell in cells
        if cell.row.policy == DEFAULT_PRESET
        and cell.row.budget in PROMISED
        and not cell.group.unseen
        and cell.group.task in PROMISED_TASKS
    ]


def _against_peers(cells: Sequence[Cell]) -> list[Verdict]:
    """The default policy less the best peer, in points, wherever both have a number."""
    best: dict[tuple[Group, float | None], Pairing] = {}
    for pair in pairings(cells):
        if pair.theirs.row.kind == "peer":
            where = pair.ours.group, pair.ours.row.budget
            if where not in best or pair.gain < best[where].gain:
                best[where] = pair
    return [
        Verdict(
            f"{pair.ours.group.title}: {pair.ours.row.key} less the best peer, "
            f"{pair.theirs.row.policy} (better on {pair.better}, worse on {pair.worse} of "
            f"{len(pair.ours.scores)}, p = {pair.p:.2g}), points beyond chance",
            _exactly(100 * (pair.gain if pair.p < CHANCE else max(0.0, pair.gain))),
            0.0,
        )
        for pair in best.values()
    ]


def _of_full(cell: Cell) -> str:
    return f"{cell.group.title}: {cell.row.key} of full"


def _exactly(value: float) -> Summary:
    return Summary(value, value, value)
