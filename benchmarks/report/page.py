"""Reports as one page: no scripts, no other files."""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_kvcompress.bench.report.read import Found, read_plot
from vllm_kvcompress.bench.report.tradeoff import Tradeoff
from vllm_kvcompress.bench.table import Table

TITLE = "KV cache compression, measured"
LONG_CELL = 28  # characters; longer cells may break their line
_NUMBER = re.compile(r"[-+±]?[\d.,]+( ?%|x| ?[kKMGT]?i?B| ?m?s)?( \(.*\))?")
_NOTHING = ("", "-")


@dataclass(frozen=True)
class Shown:
    """An image with its words, or the reason why there is none."""

    alt: str
    data: str = ""
    missing: str = ""


@dataclass(frozen=True)
class Section:
    """A report as the page shows it."""

    anchor: str
    found: Found
    plots: Sequence[Shown]

    @property
    def title(self) -> str:
        return self.found.report.title or self.found.file.stem

    @property
    def met(self) -> int:
        return sum(verdict.met for verdict in self.found.report.verdicts)


@dataclass(frozen=True)
class Chapter:
    """A trade-off with its drawn figure."""

    anchor: str
    tradeoff: Tradeoff
    table: Table
    plot: Shown
    title: str = "What is still answered right, and how fast"


@dataclass(frozen=True)
class Page:
    sections: Sequence[Section]
    chapters: Sequence[Chapter] = ()
    problems: Sequence[str] = field(default_factory=tuple)


def section(folder: Path, found: Found, number: int) -> Section:
    """A report with its plots read; those that cannot be are named."""
    plots = [_shown(folder, found, plot) for plot in found.report.plots]
    return Section(f"report-{number}", found, plots)


def image(alt: str, media: str, content: bytes) -> Shown:
    return Shown(alt, f"data:{media};base64,{base64.b64encode(content).decode()}")


def render(page: Page) -> str:
    """The page as HTML; whatever reports say is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(kind_of=kind_of, plain=_plain)
    template = environment.get_template("page.html.jinja")
    return template.render(page=page, title=TITLE)


def kind_of(cell: str) -> str:
    """The CSS class of a cell: numbers stand to the right, long words break."""
    if cell in _NOTHING or _NUMBER.fullmatch(cell):
        return "number"
    return "long" if len(cell) > LONG_CELL else "word"


def _shown(folder: Path, found: Found, plot: str) -> Shown:
    alt = f"{found.report.title or found.file.stem}: {Path(plot).stem}"
    try:
        return image(alt, *read_plot(folder, found.file, plot))
    except ValueError as error:
        return Shown(alt, missing=str(error))


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "-" if value is None else str(value)
