"""A virtual environment for a peer: made once, by its lock, beside the one that runs the bench.

kvpress needs an older transformers than vLLM does, so the two cannot share one.
"""

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from vllm_kvcompress.bench.peers.errors import PeerError

PYTORCH_INDEX = "https://download.pytorch.org/whl"
STAMP = ".made-for"  # in the environment: the hash of what it was made of, or nothing while made
UNREACHABLE = (
    "NewConnectionError",
    "NameResolutionError",
    "ConnectTimeoutError",
    "ReadTimeoutError",
    "Network is unreachable",
)
NEEDED_BYTES = {"cpu": 2 * 10**9, "cuda": 12 * 10**9}

REPORT_EVERY_S = 5

Progress = Callable[[str], None]


def peer_python(name: str, progress: Progress, venv: Path | None = None) -> Path:
    """The Python of the environment that has the peer `name`; it is made where it is missing.

    An environment that was interrupted, or made of something else, is made anew. Of several
    processes one makes it, and the others wait.

    Args:
        progress: is told what happens, a line every few seconds.
        venv: where; by default `.venv-<name>` beside the environment that runs this.

    Raises:
        PeerError: with one line, when it cannot be made.
    """
    if python := installed_python(name, venv):
        return python
    lock, venv = _lock_of(name), venv or _default_venv(name)
    stamp = stamp_of(lock, version("torch"))
    try:
        with _alone(venv.parent):
            if _made_of(venv) != stamp:
                _make(venv, lock, version("torch"), progress)
                _write_whole(venv / STAMP, stamp)
    except OSError as error:
        raise PeerError(f"cannot install {name} into {venv}: {error.strerror or error}") from None
    return _python(venv)


def installed_python(name: str, venv: Path | None = None) -> Path | None:
    """The Python of the environment that has the peer `name`, or None; nothing is made.

    Raises:
        PeerError: there is no such peer.
    """
    lock, venv = _lock_of(name), venv or _default_venv(name)
    return _python(venv) if _made_of(venv) == stamp_of(lock, version("torch")) else None


def stamp_of(lock: Path, torch: str) -> str:
    """What an environment depends on: its lock, torch's build, and Python."""
    parts = [lock.read_text(), torch, platform.python_version()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def torch_sources(torch: str) -> list[list[str]]:
    """pip's arguments for that torch, to be tried in turn.

    A local version such as `2.13.0+cpu` stands on few indexes: first the one that pip is set up
    with, then PyTorch's own for that build. Without `+cpu` torch brings its CUDA packages along,
    which no lock names.
    """
    _, _, build = torch.partition("+")
    wanted = [f"torch=={torch}", *(["--no-deps"] if build == "cpu" else [])]
    own = [*wanted, "--index-url", f"{PYTORCH_INDEX}/{build}"]
    return [wanted, own] if build else [wanted]


def _lock_of(name: str) -> Path:
    here = Path(__file__).parent
    known = {path.stem: path for path in here.glob("*.lock")}
    if name not in known:
        raise PeerError(f"no peer is called {name!r}; there is {', '.join(sorted(known))}")
    return known[name]


def _default_venv(name: str) -> Path:
    return Path(sys.prefix).parent / f".venv-{name}"


def _make(venv: Path, lock: Path, torch: str, progress: Progress) -> None:
    name = lock.stem
    _clear(venv)
    _check_room(venv.parent, torch)
    progress(f"{name}: virtual environment {venv}")
    venv.mkdir(parents=True)
    (venv / STAMP).touch()
    made = subprocess.run(
        [sys.executable, "-m", "venv", str(venv)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        raise PeerError(f"cannot make {venv}: {_last_line(made.stdout + made.stderr)}")
    python = _python(venv)
    sources = torch_sources(torch)
    for arguments in sources:
        failure = _pip(python, arguments, f"{name}: torch {torch}", progress)
        if not failure:
            break
    else:
        raise PeerError(f"cannot install torch {torch} for {name}: {failure}")
    pins = sum("==" in line for line in lock.read_text().splitlines())
    arguments = ["--no-deps", "-r", str(lock)]
    if failure := _pip(python, arguments, f"{name}: {pins} packages", progress):
        raise PeerError(f"cannot install {name}: {failure}")
    progress(f"{name}: check")
    checked = subprocess.run(
        [str(python), "-I", "-c", f"import {name}"], capture_output=True, text=True, check=False
    )
    if checked.returncode:
        raise PeerError(f"{name} was installed but fails: {_last_line(checked.stderr)}")


def _pip(python: Path, arguments: list[str], what: str, progress: Progress) -> str:
    """Why it failed, in a line; empty when it did not."""
    process = subprocess.Popen(
        [str(python), "-m", "pip", "install", "--no-input", "--progress-bar=off", *arguments],
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert process.stdout is not None
    lines = []
    progress(what)
    reported = time.monotonic()
    try:
        for line in process.stdout:
            lines.append(line.strip())
            words = line.split()
            if words[:1] == ["Collecting"] and time.monotonic() - reported > REPORT_EVERY_S:
                progress(f"{what}, fetching {words[1]}")
                reported = time.monotonic()
            elif line.startswith("Installing collected packages"):
                progress(f"{what}, unpacking")
    except BaseException:
        process.terminate()
        raise
    finally:
        process.stdout.close()
        process.wait()
    return why_pip_failed(lines) if process.returncode else ""


def why_pip_failed(lines: list[str]) -> str:
    """One line for a person, out of all that pip said."""
    text = "\n".join(lines)
    if "No space left on device" in text:
        return "the disk is full"
    if any(sign in text for sign in UNREACHABLE):
        return "the package index cannot be reached; is there a network?"
    errors = [line for line in lines if line.startswith("ERROR:")]
    return errors[0].removeprefix("ERROR:").strip() if errors else _last_line(text)


def _check_room(folder: Path, torch: str) -> None:
    needed = NEEDED_BYTES["cpu" if torch.endswith("+cpu") else "cuda"]
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise PeerError(
            f"{folder} has {free / 1e9:.1f} GB free and {needed / 1e9:.0f} GB are needed:"
            " free some, or choose another place"
        )


def _clear(venv: Path) -> None:
    """Remove what was made here before; never what somebody else put there."""
    if not venv.exists():
        return
    if any(venv.iterdir()) and not (venv / STAMP).exists():
        raise PeerError(f"{venv} is not an environment of the bench: remove it, or choose another")
    shutil.rmtree(venv)


def _made_of(venv: Path) -> str:
    try:
        return (venv / STAMP).read_text()
    except OSError:
        return ""


def _write_whole(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While no other process is in here for the same folder."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _python(venv: Path) -> Path:
    return venv / "bin" / "python"


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"
