"""What a benchmark says in the terminal: its tables, its verdicts, and where the report is."""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import typer
from rich.console import Console

from vllm_kvcompress.bench.harness import Verdict
from vllm_kvcompress.bench.table import Table

REPORT_WIDTH = 110
MISSED = 1


def terminal(width: int = REPORT_WIDTH) -> Console:
    """As wide as the terminal, or `width` where the output goes elsewhere."""
    return Console(width=None if sys.stdout.isatty() else width)


def show_results(console: Console, tables: Iterable[Table], verdicts: Sequence[Verdict]) -> None:
    """Print the tables, the verdicts that were missed, and how many were met."""
    for table in tables:
        console.print(table.rich())
    missed = [verdict for verdict in verdicts if not verdict.met]
    for verdict in missed:
        console.print(verdict.text(), highlight=False)
    console.print(f"{len(verdicts) - len(missed)} of {len(verdicts)} verdicts met", highlight=False)


def conclude(console: Console, files: Iterable[Path], verdicts: Iterable[Verdict]) -> None:
    """Say where the report is; raises typer.Exit with code 1 where a verdict was missed."""
    console.print(f"written: {', '.join(map(str, files))}", highlight=False)
    if not all(verdict.met for verdict in verdicts):
        raise typer.Exit(MISSED)
