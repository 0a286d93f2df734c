"""The rows of a quality table: who answers, and how much of the cache it may keep."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Literal

from vllm_kvcompress.bench.quality.case import Case

PLAIN, FP8 = "plain vLLM", "fp8 KV cache"
MOST_LENGTHS = 12
ENOUGH = 0.5  # of a group's cases must reach a budget for a number
Kind = Literal["plain", "fp8", "preset", "peer"]


@dataclass(frozen=True, slots=True)
class Row:
    """A policy under one budget, the share of the prompt that it may hold; None: all of it."""

    policy: str
    kind: Kind
    budget: float | None = None

    @property
    def key(self) -> str:
        return self.policy if self.budget is None else f"{self.policy} @ {self.budget:g}"

    def asks_unseen(self, unseen: bool) -> bool:
        """With all of the cache kept, it is the same whether the question was seen."""
        return unseen and self.budget is not None


@dataclass(frozen=True, slots=True)
class Group:
    """Cases that are averaged together: a table."""

    task: str
    length: int | None
    unseen: bool

    @property
    def title(self) -> str:
        length = "" if self.length is None else f", {self.length:,} tokens"
        return f"{self.task}{length}" + (", question unseen" if self.unseen else "")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one case under one row. `held_share` None: the budget cannot be reached."""

    case: str
    row: str
    unseen: bool
    text: str = ""
    score: float = 0.0
    held_share: float | None = 1.0
    error: str = ""

    @property
    def key(self) -> tuple[str, str, bool]:
        return self.case, self.row, self.unseen


@dataclass(frozen=True)
class Cell:
    """A row's scores in a group, by case.

    asked: cases of the group; those whose pages cannot reach the budget have no score.
    text: what stands in the table instead of a number, where there is none.
    note: why.
    """

    group: Group
    row: Row
    asked: int
    scores: Mapping[str, float] = field(default_factory=dict)
    held_share: float | None = None
    text: str = ""
    note: str = ""

    @property
    def score(self) -> float:
        """Mean; NaN without any case."""
        return mean(self.scores.values()) if self.scores else float("nan")

    def of(self, full: "Cell") -> float:
        """The score as a share of another row's on the same cases; NaN where that is 0."""
        theirs = sum(full.scores[case] for case in self.scores)
        return sum(self.scores.values()) / theirs if theirs else float("nan")


def grouped(cases: Sequence[Case], unseen: bool) -> dict[Group, list[Case]]:
    """Cases by task and length; by task alone where its lengths are all different."""
    lengths: dict[str, set[int | None]] = {}
    for case in cases:
        lengths.setdefault(case.task, set()).add(case.length)
    out: dict[Group, list[Case]] = {}
    for case in cases:
        one_of_few = len(lengths[case.task]) <= MOST_LENGTHS
        group = Group(case.task, case.length if one_of_few else None, unseen)
        out.setdefault(group, []).append(case)
    return out


def cells(
    cases: Sequence[Case],
    rows: Sequence[Row],
    modes: Iterable[bool],
    outcomes: Iterable[Outcome],
    absent: Mapping[str, str],
) -> list[Cell]:
    """Average what is there, group by group; a row shows nothing before all its cases are in.

    Args:
        modes: question seen (False), unseen (True), or both.
        absent: why a policy could not run at all, by its name.
    """
    found = {outcome.key: outcome for outcome in outcomes}
    return [
        _cell(
            group,
            row,
            [found.get((case.key, row.key, row.asks_unseen(unseen))) for case in mine],
            absent.get(row.policy, ""),
        )
        for unseen in modes
        for group, mine in grouped(cases, unseen).items()
        for row in rows
    ]


def _cell(group: Group, row: Row, outcomes: Sequence[Outcome | None], absent: str) -> Cell:
    asked = len(outcomes)
    there = [outcome for outcome in outcomes if outcome is not None]
    if absent and not there:
        return Cell(group, row, asked, text="none", note=absent)
    if len(there) < asked:
        return Cell(group, row, asked, text=f"{len(there)} of {asked} cases")
    if failed := [outcome for outcome in there if outcome.error]:
        return Cell(group, row, asked, text=f"{len(failed)} failed", note=failed[0].error)
    scores = {o.case: o.score for o in there if o.held_share is not None}
    if len(scores) < asked * ENOUGH:
        return Cell(group, row, asked, text="-")
    return Cell(group, row, asked, scores, mean(o.held_share for o in there if o.held_share))
