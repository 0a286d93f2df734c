"""What every benchmark shares: paired statistics, verdicts, facts of the machine, a report."""

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from vllm_kvcompress.bench.engine import MODEL
from vllm_kvcompress.bench.errors import BenchError
from vllm_kvcompress.bench.table import Table

SCRIPT = "vllm-kvcompress"
PACKAGES = ("vllm-kvcompress", "vllm", "torch", "numpy")


@dataclass(frozen=True)
class Summary:
    """Median and range of a few samples."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(samples: Iterable[float]) -> "Summary":
        """Raises ValueError without samples."""
        values = list(samples)
        if not values:
            raise ValueError("no samples to summarise")
        return Summary(median(values), min(values), max(values))

    def text(self, digits: int = 0) -> str:
        middle = f"{self.median:,.{digits}f}"
        if self.low == self.high:
            return middle
        return f"{middle} ({self.low:,.{digits}f}-{self.high:,.{digits}f})"


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> Summary:
    """Ours over theirs, round by round: what slows a whole round down cancels out.

    Raises:
        ValueError: the rounds do not pair up.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} rounds against {len(theirs)}: they do not pair up")
    return Summary.of(a / b for a, b in zip(ours, theirs, strict=True))


@dataclass(frozen=True)
class Verdict:
    """A ratio or a share held against its target: at least, or at most, so much."""

    what: str
    measured: Summary
    target: float
    at_most: bool = False

    @property
    def met(self) -> bool:
        median = self.measured.median
        return median <= self.target if self.at_most else median >= self.target

    def text(self) -> str:
        bound = "at most" if self.at_most else "at least"
        shown = f"{self.what}: {self.measured.text(3)}, target {bound} {self.target:g}"
        if self.met:
            return f"met     {shown}"
        off = abs(self.measured.median - self.target)
        by = f"{off / abs(self.target):.0%}" if self.target else f"{off:.3g}"
        return f"MISSED  {shown}: {by} {'above' if self.at_most else 'below'}"


def machine_facts(threads: int) -> dict[str, Any]:
    """Where and with what the numbers were made."""
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "load_average": os.getloadavg()[0],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else "unknown"


def write_report(
    path: Path,
    threads: int,
    parameters: Mapping[str, Any],
    *,
    bench: str = "",
    title: str = "",
    tables: Iterable[Table] = (),
    plots: Iterable[Path] = (),
    verdicts: Iterable[Verdict] = (),
    **results: Any,
) -> None:
    """A JSON report: the command, the machine, the parameters, then the results.

    Args:
        bench: which command made it, the word after `vllm-kvcompress bench`.
        title: one line for people.
        plots: image files; those beside the report, or below it, are shown by `bench report`.

    Raises:
        BenchError: with one line, when the file cannot be written.
    """
    report = {
        "bench": bench,
        "title": title,
        "command": command_line(sys.orig_argv),
        "machine": machine_facts(threads),
        "parameters": {key: _plain(value) for key, value in parameters.items()},
        "tables": [asdict(table) for table in tables],
        "plots": [os.path.relpath(plot, path.parent) for plot in plots],
        "verdicts": [{**asdict(verdict), "met": verdict.met} for verdict in verdicts],
        **results,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")
    except OSError as error:
        raise BenchError(f"cannot write {path}: {error.strerror}") from None


def command_line(arguments: Sequence[str]) -> str:
    """What to type to get this again; `arguments` begin with the interpreter."""
    script = Path(arguments[1]).name if len(arguments) > 1 else ""
    words = [script, *arguments[2:]] if script == SCRIPT else ["python", *arguments[1:]]
    return shlex.join(words)


def model_name(model: str | Path) -> str:
    """The shipped model by name, any other as it was given."""
    return "demo model" if str(model) == str(MODEL) else str(model)


def _plain(value: Any) -> Any:
    return model_name(value) if isinstance(value, str | Path) else value


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the source tree this file stands in, with a `+` where it was changed since."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
