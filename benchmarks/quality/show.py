"""Cells as tables for people, and flat for spreadsheets."""

from collections.abc import Iterable, Sequence
from statistics import mean

from vllm_kvcompress.bench.quality.judge import pairings
from vllm_kvcompress.bench.quality.rows import FP8, Cell, Group
from vllm_kvcompress.bench.table import Table
from vllm_kvcompress.presets import DEFAULT_PRESET

SAME_SHARE = 0.005
HALF_WIDTH = 0.98  # of a 95 % interval, times 1/sqrt(n), where a score is right or wrong


def quality_tables(cells: Sequence[Cell]) -> list[Table]:
    """A table per group: mean scores in %, a column per budget under the share really held."""
    groups = list(dict.fromkeys(cell.group for cell in cells))
    return [_table(group, [c for c in cells if c.group == group]) for group in groups]


def _table(group: Group, cells: Sequence[Cell]) -> Table:
    budgets = sorted({c.row.budget for c in cells if c.row.budget is not None}, reverse=True)
    shares = {budget: _share_of(budget, cells) for budget in budgets}
    heads = [_head(budget, shares[budget]) for budget in budgets]
    rows = []
    for policy in dict.fromkeys(c.row.policy for c in cells):
        mine = {c.row.budget: c for c in cells if c.row.policy == policy}
        if None in mine:
            rows.append([policy, _text(mine[None], None), *[""] * len(budgets)])
        else:
            texts = [_text(mine[b], shares[b]) if b in mine else "" for b in budgets]
            rows.append([policy, "", *texts])
    n = max(c.asked for c in cells)
    spread = f"; ±{100 * HALF_WIDTH / n**0.5:.1f} points at most" if n else ""
    legend = f"Mean score in %{spread}. Columns: the share of the prompt's cache really held."
    if any(c.text == "-" for c in cells):
        legend += " -: whole pages cannot get there."
    notes = dict.fromkeys(f"{c.row.policy}: {c.note.rstrip('.')}." for c in cells if c.note)
    return Table(
        f"{group.title}, n = {n}", ["policy", "100 %", *heads], rows, " ".join([legend, *notes])
    )


def mean_table(cells: Sequence[Cell]) -> Table | None:
    """The mean over all groups of one kind of question, where there are several."""
    seen = [c for c in cells if not c.group.unseen] or list(cells)
    groups = list(dict.fromkeys(c.group for c in seen))
    if len(groups) < 2:
        return None
    budgets = sorted({c.row.budget for c in seen if c.row.budget is not None}, reverse=True)
    rows = []
    for policy in dict.fromkeys(c.row.policy for c in seen):
        texts = []
        for budget in (None, *budgets):
            mine = [c for c in seen if (c.row.policy, c.row.budget) == (policy, budget)]
            whole = [c for c in mine if len(c.scores) == c.asked]
            if mine and len(whole) == len(mine):
                texts.append(f"{100 * mean(c.score for c in mine):.1f}")
            else:
                texts.append(next((c.text for c in mine if c.text), ""))
        rows.append([policy, *texts])
    shares = [_share_of(budget, seen) for budget in budgets]
    heads = [_head(budget, share) for budget, share in zip(budgets, shares, strict=True)]
    return Table(
        f"mean over {len(groups)} tasks",
        ["policy", "100 %", *heads],
        rows,
        "Mean score in % by the share of the prompt's cache really held.",
    )


def _share_of(budget: float, cells: Iterable[Cell]) -> float | None:
    held = [c.held_share for c in cells if c.row.budget == budget and c.row.kind == "preset"]
    return next((share for share in held if share is not None), None)


def _head(budget: float, share: float | None) -> str:
    return f"{100 * (budget if share is None else share):.3g} %"


def _text(cell: Cell, share: float | None) -> str:
    if not cell.scores:
        return cell.text
    score = f"{100 * cell.score:.1f}"
    if len(cell.scores) < cell.asked:
        score += f" (n = {len(cell.scores)})"
    held = cell.held_share
    if share is None or held is None or abs(held - share) <= SAME_SHARE:
        return score
    return f"{score} ({100 * held:.3g} % held)"


def paired_table(cells: Sequence[Cell], policy: str = DEFAULT_PRESET) -> Table | None:
    """The default policy against every other one on the same cases."""
    pairs = pairings(cells, policy)
    if not pairs:
        return None
    rows = [
        [
            f"{pair.ours.group.title}, {100 * (pair.ours.held_share or 0):.3g} % held",
            pair.theirs.row.policy,
            f"{100 * pair.gain:+.1f}",
            str(pair.better),
            str(pair.worse),
            f"{pair.p:.2g}",
        ]
        for pair in pairs
    ]
    return Table(
        f"{policy} case by case",
        ["on", "against", "points", "better", "worse", "p"],
        rows,
        "Points: mean score less theirs. Better, worse: cases on which the scores differ; "
        "p: sign test on those.",
    )


def flat_table(cells: Sequence[Cell]) -> Table:
    """Every cell a row, for a CSV file."""
    columns = "task length unseen policy budget held_share n score note".split()
    rows = [
        [
            c.group.task,
            str(c.group.length or ""),
            str(c.group.unseen).lower(),
            c.row.policy,
            "" if c.row.budget is None else f"{c.row.budget:g}",
            "" if c.held_share is None else f"{c.held_share:.4f}",
            str(len(c.scores)),
            f"{c.score:.4f}" if c.scores else "",
            c.note or c.text,
        ]
        for c in cells
    ]
    return Table("cells", columns, rows)


def so_far(scores: dict[str, list[float]]) -> str:
    """For a progress bar: the mean score of every row that has any."""
    known = [(row, sum(s) / len(s)) for row, s in scores.items() if s and row != FP8]
    return ", ".join(f"{row} {mean:.0%}" for row, mean in known[:3])
