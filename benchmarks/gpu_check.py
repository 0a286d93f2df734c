"""Everything that only a GPU can say, in one command and eight minutes.

    python -P benchmarks/gpu_check.py --json gpu.json        # a checkout, vLLM on the path
    python -P -m vllm_kvcompress.bench.gpu_check             # installed
    python -P benchmarks/gpu_check.py --rehearse             # no GPU: the same code, small shapes

Each section is a process of its own with a time limit, so one that fails or hangs stops no other.
It is started while the one before it runs, and imports its packages meanwhile. Every row is
printed, and written to the report, as soon as it is known. Needs the standard library only; the
sections are in `benchmarks/gpu/`.
"""

import argparse
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

MINUTES, REHEARSAL_MINUTES = 8, 60
# What runs, in this order, and the most seconds of the eight minutes that each may take.
LIMITS_S = {
    "machine": 40,
    "kernels": 100,
    "graphs": 30,
    "identity": 100,
    "bandwidth": 40,
    "codec": 25,
    "plain": 120,
    "compressed": 200,
}
ON_REQUEST_S = {"flashinfer": 300}  # nvcc builds its kernel for minutes
SECTION = "vllm_kvcompress.bench.gpu.section"
ENVIRONMENT = {
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_USE_DEEP_GEMM": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}
ENTRY_POINT = "[vllm.general_plugins]\nkv_compress = vllm_kvcompress.plugin:register\n"
MISSED, NOTHING_MEASURED, INTERRUPTED = 1, 2, 130
MIN_COLUMNS = 100
HELP = """sections, in this order:
  machine     the GPU, its free memory, and the software on it (always)
  kernels     every Triton and CUDA kernel against float64; builds the CUDA kernels, once
  graphs      tables and attention in a CUDA graph, replayed after their inputs have changed
  identity    the demo model at rate 1 says what plain vLLM says, in graphs and without
  bandwidth   decode attention against a copy, and against FlashAttention for plain vLLM
  codec       CacheGen's codec: the CPU's bytes, and its speed
  plain       an 8B shape with random weights in plain vLLM: tokens per second, first tokens
  compressed  the same at rates 8, 64 and 1, `off`, `fastkv` and `tsp`, beside `plain`
  flashinfer  only if named: its attention engine, whose kernel nvcc builds for minutes

example: vllm-kvcompress bench gpu --json gpu.json
needs: an NVIDIA GPU of compute capability 8.0 or more that is idle, with 24 GB; vLLM for CUDA; no
network, no model. nvcc, if it is there, builds the CUDA kernels.

exit code: 0, all verdicts are met; 1, one is missed, or a section failed or was cut off; 2, nothing
was measured; 130, interrupted
"""


def lay_out(checkout: Path, site: Path) -> None:
    """Make `site` what an install would be, by links: top-level folders go inside the package."""
    package = site / "vllm_kvcompress"
    package.mkdir(parents=True)
    inside = {path.name: path for path in (checkout / "vllm_kvcompress").iterdir()}
    inside |= {"kernels": checkout / "kernels", "configs": checkout / "configs"}
    for name, path in (inside | {"bench": checkout / "benchmarks"}).items():
        (package / name).symlink_to(path)
    info = site / "vllm_kvcompress-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-kvcompress\nVersion: 0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINT)


def is_installed() -> bool:
    return find_spec("vllm_kvcompress") is not None and find_spec(SECTION) is not None


class Process:
    """A section, which imports its packages and waits for its turn."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            start_new_session=True,  # so that what it starts ends with it
        )

    def messages(self, figures: Mapping[str, float], until: float) -> Iterator[dict[str, Any]]:
        """What it says from now on, line by line; the last one has a `state`.

        Args:
            until: when it is ended, by `time.monotonic()`.
        """
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has died: what it said before is read below
            os.write(self._process.stdin.fileno(), json.dumps(figures).encode() + b"\n")
        began = time.monotonic()
        try:
            for line in self._lines(until):
                if not line.startswith(b"{"):
                    continue  # what Python's own start has printed
                yield (message := json.loads(line))
                if "state" in message:
                    return
        except TimeoutError:
            yield {"state": "timed out", "why": f"cut off after {time.monotonic() - began:.0f} s"}
            return
        finally:
            self.end()
        yield {"state": "failed", **self._last_words()}

    def _lines(self, until: float) -> Iterator[bytes]:
        assert self._process.stdout is not None
        rest = b""
        while True:
            left = max(0.0, until - time.monotonic())
            if not select.select([self._process.stdout], [], [], left)[0]:
                raise TimeoutError
            if not (said := os.read(self._process.stdout.fileno(), 1 << 16)):
                return
            *lines, rest = (rest + said).split(b"\n")
            yield from lines

    def _last_words(self) -> dict[str, str]:
        """Why it ended: a signal's name, or the last line that it wrote."""
        self._stderr.seek(0)
        said = self._stderr.read().decode(errors="replace").strip()
        code = self._process.returncode
        if code < 0:
            why = f"killed by {signal.Signals(-code).name}"
        else:
            why = said.splitlines()[-1][-300:] if said else f"it ended with {code} and said nothing"
        return {"why": why, "stderr": said[-4000:]}

    def end(self) -> None:
        """Kill it, with all that it has started, unless it is done."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(0.5)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@dataclass
class Report:
    """What all sections have found so far, on the screen and in a file."""

    path: Path | None
    head: Mapping[str, Any]
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)

    def begin(self, name: str, limit_s: float) -> None:
        print(f"\n{name} (at most {limit_s:.0f} s)", flush=True)
        self.sections[name] = {"state": "running", "rows": []}

    def add(self, name: str, row: Mapping[str, Any]) -> None:
        self.sections[name]["rows"].append(row)
        self.figures |= row.get("figures", {})
        print(line(row), flush=True)
        self._save()

    def close(self, name: str, seconds: float, state: str, **more: str) -> None:
        """`missed` where it is `ok` but for its verdicts."""
        section = self.sections[name]
        if state == "ok" and any(row.get("met") is False for row in section["rows"]):
            state = "missed"
        section |= {"state": state, "seconds": round(seconds, 1), **more}
        why = f": {more['why']}" if "why" in more else ""
        print(f"  {state} after {seconds:.0f} s{why}", flush=True)
        self._save()

    def _save(self) -> None:
        """Measuring goes on where the file cannot be written any more."""
        try:
            self.write()
        except OSError as error:
            print(f"{self.path} is cut off here: {error.strerror}", file=sys.stderr, flush=True)
            self.path = None

    def write(self) -> None:
        """Raises OSError."""
        if self.path is not None:
            report = {**self.head, "sections": self.sections}
            scratch = self.path.with_name(f"{self.path.name}.new")
            scratch.write_text(json.dumps(report, indent=1) + "\n")
            os.replace(scratch, self.path)

    def code(self) -> int:
        states = {name: section["state"] for name, section in self.sections.items()}
        if "interrupted" in states.values():
            return INTERRUPTED
        if all(state == "skipped" for name, state in states.items() if name != "machine"):
            return NOTHING_MEASURED
        return MISSED if set(states.values()) - {"ok", "skipped"} else 0

    def summary(self) -> str:
        rows = [row for section in self.sections.values() for row in section["rows"]]
        met = [row["met"] for row in rows if "met" in row]
        ends = [section["state"] for section in self.sections.values()]
        cut = sum(state not in ("ok", "missed", "skipped") for state in ends)
        text = f"\n{met.count(True)} verdicts met, {met.count(False)} missed"
        text += f"; {cut} of {len(ends)} sections did not reach their end" if cut else ""
        text += f"\n{self.path} has all of it" if self.path else ""
        return text


def line(row: Mapping[str, Any]) -> str:
    """The verdict, what was looked at, what was found, and what that is held against."""
    verdict = {True: "met", False: "MISSED"}.get(row.get("met"), "")  # type: ignore[arg-type]
    bound = f"  [{row['bound']}]" if "bound" in row else ""
    return textwrap.fill(
        f"  {verdict:<7} {row['what']}: {row['found']}{bound}",
        width=max(MIN_COLUMNS, shutil.get_terminal_size().columns),
        subsequent_indent=" " * 14,
    )


def run(
    commands: Mapping[str, Sequence[str]],
    limits_s: Mapping[str, float],
    total_s: float,
    environment: Mapping[str, str],
    report: Report,
) -> None:
    """Run sections one after another; the next one's process is started meanwhile.

    Where `machine` is skipped, nothing else is run.
    """
    until = time.monotonic() + total_s
    names = list(commands)
    waiting = {name: Process(commands[name], environment) for name in names[:1]}
    try:
        for name, following in zip(names, [*names[1:], None], strict=True):
            if following:
                waiting[following] = Process(commands[following], environment)
            began = time.monotonic()
            limit_s = min(limits_s[name], until - began)
            if limit_s <= 0:
                report.begin(name, 0)
                report.close(name, 0, "timed out", why="no time was left: see --minutes")
                continue
            report.begin(name, limit_s)
            end = {"state": "interrupted"}
            try:
                for message in waiting[name].messages(report.figures, began + limit_s):
                    if "row" in message:
                        report.add(name, message["row"])
                    else:
                        end = message
            finally:
                report.close(name, time.monotonic() - began, **end)
            if name == "machine" and end["state"] == "skipped":
                return
    finally:
        for process in waiting.values():
            process.end()


def options_of(arguments: Sequence[str] | None, prog: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog,
        description=__doc__.splitlines()[0],
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = [name for name in (*LIMITS_S, *ON_REQUEST_S) if name != "machine"]
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write all of it there, row by row"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=known,
        default=[name for name in known if name in LIMITS_S],
        metavar="SECTION",
        help="these sections alone",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        help=f"all sections together, their limits grow with it (default: {MINUTES})",
    )
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="no GPU: run all of it on one that is pretended; no figure of that means anything",
    )
    options = parser.parse_args(arguments)
    if options.minutes is None:
        options.minutes = REHEARSAL_MINUTES if options.rehearse else MINUTES
    elif not 0 < options.minutes <= 24 * 60:
        parser.error(f"--minutes {options.minutes:g} is not between 0 and {24 * 60}")
    return options


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """The exit code, as `--help` says."""
    options = options_of(arguments, prog)
    environment = dict(ENVIRONMENT)
    if options.rehearse:
        print("A rehearsal without a GPU: no figure below means anything.", flush=True)
        environment |= {"KV_COMPRESS_REHEARSAL": "1", "VLLM_USE_V2_MODEL_RUNNER": "0"}
    names = ["machine", *sorted(options.only, key=[*LIMITS_S, *ON_REQUEST_S].index)]
    commands = {name: [sys.executable, "-P", "-m", SECTION, name] for name in names}
    longer = options.minutes / MINUTES
    limits_s = {name: s * longer for name, s in (LIMITS_S | ON_REQUEST_S).items()}
    head = {"rehearsal": options.rehearse, "minutes": options.minutes}
    report = Report(options.json, head)
    try:
        report.write()
    except OSError as error:
        print(f"{options.json} cannot be written: {error.strerror}", file=sys.stderr)
        return NOTHING_MEASURED
    with ExitStack() as stack:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        stack.callback(signal.signal, signal.SIGTERM, before)
        if not is_installed():
            site = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "site"
            lay_out(Path(__file__).resolve().parent.parent, site)
            paths = [str(site), os.environ.get("PYTHONPATH", "")]
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        with suppress(KeyboardInterrupt):  # its section says so
            run(commands, limits_s, options.minutes * 60, environment, report)
    code = report.code()
    if code == NOTHING_MEASURED:
        print(
            "\nNothing was measured. --rehearse runs the same code without a GPU.", file=sys.stderr
        )
    else:
        print(report.summary())
    return code


if __name__ == "__main__":
    sys.exit(main())
