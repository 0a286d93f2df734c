"""A table as data: printed in the terminal, written into reports, drawn on the page alike."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import rich.table


@dataclass(frozen=True)
class Table:
    """Cells are text as a reader should see it; the first column names the row.

    note: a sentence on what the numbers are, shown with the table.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"{self.title}: {len(row)} cells for {len(self.columns)} columns")

    def rich(self) -> rich.table.Table:
        out = rich.table.Table(title=self.title, caption=self.note or None)
        for index, column in enumerate(self.columns):
            out.add_column(column, justify="right" if index else "left", no_wrap=index == 0)
        for row in self.rows:
            out.add_row(*row)
        return out

    def write_csv(self, path: Path) -> None:
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([self.columns, *self.rows])
