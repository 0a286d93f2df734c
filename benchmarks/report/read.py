"""The reports of a folder, as `harness.write_report` wrote them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from vllm_kvcompress.bench.harness import Verdict
from vllm_kvcompress.bench.table import Table

ORDER = ("quality", "throughput", "serve", "attention", "prefill", "codec")
MAX_REPORT_BYTES = 2**28
MAX_PLOT_BYTES = 2**24
MEDIA = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".svg": "image/svg+xml"}


class Machine(BaseModel):
    """Where and with what the numbers were made."""

    cpu: str
    cores: int
    threads: int
    memory_gib: float
    system: str
    python: str
    versions: dict[str, str | None]
    commit: str | None
    load_average: float
    date: datetime


class Report(BaseModel):
    """What every benchmark writes; whatever else stands in the file is kept as it is."""

    model_config = ConfigDict(extra="allow")

    bench: str = ""
    title: str = ""
    command: str
    machine: Machine
    parameters: dict[str, Any]
    tables: list[Table]
    plots: list[str]
    verdicts: list[Verdict]
    notes: list[str] = []

    def extra(self, name: str) -> Any:
        return (self.model_extra or {}).get(name)


@dataclass(frozen=True)
class Found:
    """A report, and its file below the folder that was read."""

    file: Path
    report: Report


def read_reports(folder: Path) -> tuple[list[Found], list[str]]:
    """Every report below a folder, by bench and name, and a line on every JSON file that is none.

    Raises:
        OSError: the folder cannot be listed.
    """
    list(folder.iterdir())
    found, problems = [], []
    for path in sorted(folder.rglob("*.json")):
        try:
            found.append(Found(path.relative_to(folder), read_report(path)))
        except ValueError as error:
            problems.append(f"{path.relative_to(folder)}: {error}")
    return sorted(found, key=_place), problems


def read_report(path: Path) -> Report:
    """A report from its file.

    Raises:
        ValueError: in one line, why it is none.
    """
    try:
        if path.stat().st_size > MAX_REPORT_BYTES:
            raise ValueError(f"larger than {MAX_REPORT_BYTES / 2**20:.0f} MiB")
        return Report.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    except RecursionError:
        raise ValueError("not JSON: nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError("not JSON: not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise ValueError(f"no report of the bench: {where}: {first['msg'].lower()}") from None


def read_plot(folder: Path, report: Path, plot: str) -> tuple[str, bytes]:
    """(media type, bytes) of a plot that a report names.

    Args:
        folder: nothing outside it is read.
        report: the report's file below it.

    Raises:
        ValueError: in one line, why it cannot be shown.
    """
    path = folder / report.parent / plot
    media = MEDIA.get(path.suffix.lower())
    if media is None:
        raise ValueError(f"{plot}: no image of a known kind")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{plot}: not in the folder of the reports")
    try:
        if path.stat().st_size > MAX_PLOT_BYTES:
            raise ValueError(f"{plot}: larger than {MAX_PLOT_BYTES / 2**20:.0f} MiB")
        return media, path.read_bytes()
    except OSError as error:
        raise ValueError(f"{plot}: {error.strerror}") from None


def _place(found: Found) -> Sequence[Any]:
    bench = found.report.bench
    return ORDER.index(bench) if bench in ORDER else len(ORDER), bench, str(found.file)
