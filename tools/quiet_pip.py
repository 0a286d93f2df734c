"""pip, showing one line of progress, and its own output only when it fails."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

REPORT_EVERY_S = 15  # where the line cannot be rewritten in place, as in a log file


class PipFailed(RuntimeError):
    """pip ended with an error; the message is pip's whole output."""


def pip(python: Path, *arguments: str) -> None:
    """Run `python -m pip *arguments`; raise PipFailed with pip's output if it fails."""
    command = [str(python), "-m", "pip", *arguments, "--no-input", "--progress-bar=off"]
    environment = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command,
        env=environment,
        text=True,
        errors="replace",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    lines: list[str] = []
    reader = threading.Thread(target=lines.extend, args=(process.stdout,), daemon=True)
    reader.start()
    try:
        show_progress(process, lines)
    except BaseException:
        process.terminate()
        process.wait()
        raise
    reader.join()
    if process.returncode:
        raise PipFailed(" ".join(command) + "\n" + "".join(lines))


def show_progress(process: subprocess.Popen[str], lines: list[str]) -> None:
    """Say what pip is doing until it ends."""
    rewritable = sys.stdout.isatty()
    start = reported = time.monotonic()
    while True:
        try:
            process.wait(timeout=0.5)
            break
        except subprocess.TimeoutExpired:
            now = time.monotonic()
        text = f"      {now - start:3.0f} s  {activity(lines)}"
        if rewritable:
            print(f"\r{text:<78.78}", end="", flush=True)
        elif now - reported >= REPORT_EVERY_S:
            reported = now
            print(f"{text:.100}", flush=True)
    if rewritable:
        print(f"\r{'':78}\r", end="", flush=True)


def activity(lines: list[str]) -> str:
    """What pip is doing, by its output so far, in a few words."""
    so_far = list(lines)
    named = [line.split()[1] for line in so_far if line.startswith(("Collecting ", "Processing "))]
    latest = named[-1].rsplit("/", 1)[-1] if named else ""
    if any(line.startswith("Installing collected packages") for line in so_far):
        return f"unpacking {latest}" if len(named) == 1 else f"unpacking {len(named)} packages"
    return f"fetching {latest} ({len(named)})" if named else "looking"
