"""The tasks by name, and the cases of a run."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

from vllm_kvcompress.bench.quality import demo, haystack, longbench, ruler
from vllm_kvcompress.bench.quality.case import Case
from vllm_kvcompress.bench.quality.longbench import Reading

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
MAX_LENGTH = 2**24
MAX_CASES = 100_000  # of one task, length and depth

Count = Callable[[str], int]


@dataclass(frozen=True)
class Cell:
    """What the cases of one task, length and depth are made for.

    depth: None for anywhere.
    count: how many tokens a text has, without the special ones.
    """

    length: int
    depth: float | None
    count: Count


@dataclass(frozen=True)
class Task:
    """A task whose cases are made, to any length.

    make: one more case from the generator.
    grid: whether there are `n` cases for every depth, not for all together.
    """

    about: str
    make: Callable[[Random, Cell], Case]
    grid: bool = False


@dataclass(frozen=True)
class DataSet:
    """A task whose cases exist; they are as long as they are.

    load: that many of them, chosen by the generator.
    """

    about: str
    load: Callable[[Random, int, Reading], list[Case]]


def _ruler_needles(name: str) -> Task:
    return Task(
        ruler.NIAH[name].about,
        lambda rng, cell: ruler.niah(name, rng, cell.length, cell.count),
    )


def _longbench(name: str) -> DataSet:
    return DataSet(longbench.SUBSETS[name].about, partial(longbench.longbench, name))


def _longbench_v2(length: str) -> DataSet:
    return DataSet(
        f"four choices on texts that it calls {length}", partial(longbench.longbench_v2, length)
    )


GROUPS: dict[str, dict[str, Task | DataSet]] = {
    "demo": {
        "needle": Task(
            "one fact, anywhere in the prompt",
            lambda rng, cell: demo.needle(rng, cell.length),
        ),
        "many-facts": Task(
            f"{demo.FACTS} facts, one is asked for",
            lambda rng, cell: demo.many_facts(rng, cell.length),
        ),
        "span": Task(
            "ten words to recite in order",
            lambda rng, cell: demo.span(rng, cell.length),
        ),
    },
    "demo-grid": {
        "needle-grid": Task(
            "one fact at every depth",
            lambda rng, cell: demo.needle(rng, cell.length, cell.depth),
            grid=True,
        ),
    },
    "niah": {
        "niah-number": Task(
            "a number of five digits in an essay, at every depth",
            lambda rng, cell: haystack.number_needle(rng, cell.length, cell.depth, cell.count),
            grid=True,
        ),
        "niah-words": Task(
            "three names in an essay, at every depth",
            lambda rng, cell: haystack.words_needle(rng, cell.length, cell.depth, cell.count),
            grid=True,
        ),
    },
    "ruler": {
        **{name: _ruler_needles(name) for name in ruler.NIAH},
        "vt": Task(
            "five variables that hold the same number by assignment",
            lambda rng, cell: ruler.variable_tracking(rng, cell.length, cell.count),
        ),
        "cwe": Task(
            "the ten common words of a list",
            lambda rng, cell: ruler.common_words(rng, cell.length, cell.count),
        ),
        "fwe": Task(
            "the three most frequent words of a coded text",
            lambda rng, cell: ruler.frequent_words(rng, cell.length, cell.count),
        ),
    },
    "longbench": {name: _longbench(name) for name in longbench.SUBSETS},
    "longbench-v2": {
        f"longbench-v2-{length}": _longbench_v2(length) for length in longbench.LENGTHS_V2
    },
}
ABOUT_GROUPS = {
    "demo": "the shipped demo model's language, the only one that it reads",
    "demo-grid": "the same over depth, for a heat map",
    "niah": "needle in a haystack of plain English over length and depth",
    "ruler": "RULER's synthetic tasks (arXiv 2404.06654), made to any length",
    "longbench": "LongBench's English and code tasks (arXiv 2308.14508), from the Hugging Face hub",
    "longbench-v2": "LongBench-v2 (arXiv 2412.15204), from the hub",
}


def make_cases(
    names: Iterable[str],
    lengths: Sequence[int],
    depths: Sequence[float],
    n: int,
    seed: int,
    count: Count,
    *,
    longbench_path: Path | None = None,
    model_tokens: int | None = None,
) -> list[Case]:
    """`n` cases of every task and length, of grid tasks of every depth, of data sets of the task.

    The same arguments make the same cases, and those of a task, length and depth depend on no
    other; a larger `n` adds to them.

    Args:
        names: tasks and groups.
        lengths: prompt tokens, as `count` sees them; cases of data sets have their own.
        depths: 0 (first) to 1 (right before the question); `DEPTHS` when empty.
        count: how many tokens a text has, without the special ones.
        longbench_path: the folder of LongBench's files; None for the Hugging Face hub.
        model_tokens: what prompt and answer may have together: cases of data sets lose the middle
            of their context where they have more. None leaves them as they are.

    Raises:
        ValueError: in one line: an unknown name, a number out of its bounds, a length that is too
            short for a task, or data that cannot be had.
    """
    chosen = find_tasks(names)
    depths = depths or DEPTHS
    _check_bounds(lengths, depths, n)
    reading = Reading(count, longbench_path, model_tokens)
    cases: list[Case] = []
    for name, task in chosen.items():
        if isinstance(task, DataSet):
            cases += task.load(Random(f"{seed} {name}"), n, reading)
        else:
            cells = (
                Cell(length, depth, count)
                for length in dict.fromkeys(lengths)
                for depth in (dict.fromkeys(depths) if task.grid else (None,))
            )
            cases += [case for cell in cells for case in _made(name, task, cell, n, seed)]
    return cases


def _made(name: str, task: Task, cell: Cell, n: int, seed: int) -> list[Case]:
    where = f"{name} {cell.length}" + ("" if cell.depth is None else f" {cell.depth:g}")
    rng = Random(f"{seed} {where}")
    try:
        made = [task.make(rng, cell) for _ in range(n)]
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return [case.model_copy(update={"task": name}) for case in made]


def find_tasks(names: Iterable[str]) -> dict[str, Task | DataSet]:
    """The tasks that `names` of tasks and groups stand for, each once, in order.

    Raises:
        ValueError: a name that is neither; the message lists those that are.
    """
    every = {name: task for group in GROUPS.values() for name, task in group.items()}
    found: dict[str, Task | DataSet] = {}
    for name in names:
        if name in GROUPS:
            found |= GROUPS[name]
        elif name in every:
            found[name] = every[name]
        else:
            known = f"the tasks are {', '.join(every)}; the groups {', '.join(GROUPS)}"
            raise ValueError(f"no task {name!r}: {known}")
    return found


def task_help() -> str:
    """Every group and task with what it asks, for `--help`: Markdown."""
    parts = []
    for group, tasks in GROUPS.items():
        parts.append(f"**{group}**: {ABOUT_GROUPS[group]}")
        parts.append("\n".join(f"* {name}: {task.about}" for name, task in tasks.items()))
    return "\n\n".join(parts)


def _check_bounds(lengths: Sequence[int], depths: Sequence[float], n: int) -> None:
    if not 1 <= n <= MAX_CASES:
        raise ValueError(f"n is {n}: choose 1 to {MAX_CASES:,} cases")
    for length in lengths:
        if not 1 <= length <= MAX_LENGTH:
            raise ValueError(f"a length is {length}: choose 1 to {MAX_LENGTH:,} tokens")
    for depth in depths:
        if not 0 <= depth <= 1:
            raise ValueError(f"a depth is {depth}: choose 0 (first) to 1 (before the question)")
