"""The CUDA kernels of `csrc/` as a library: found where it was built before, else built by nvcc.

One library per compute capability. Users keep theirs in a folder of their own, images have it
inside the package (`vllm-kvcompress build-cuda --in-package`).
"""

import fcntl
import hashlib
import logging
import os
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import torch

CSRC = Path(__file__).resolve().parents[1] / "csrc"
IN_PACKAGE = CSRC / "built"
SOURCES = (
    "pages/attend.cu",
    "pages/compact.cu",
    "codec/decode.cu",
    "codec/encode.cu",
    "codec/tables.cpp",
)
READ_BY_THEM = ("launch.cuh", "pages/*.[ch]*", "codec/*.cuh", "codec/*.h")
LONGEST_S = 900

logger = logging.getLogger("vllm.kv_compress.kernels")  # vLLM's handlers show what is below `vllm`


class CannotBuild(RuntimeError):
    """There is no library and none can be made; one line that says why."""


@cache
def cuda_library() -> Path | None:
    """The CUDA kernels for the current GPU, built where that was not done before.

    Building takes up to a minute and more: call this at start-up. Of several processes that call
    at once, one builds. None where there is no NVIDIA GPU, and, with a line in the log, where
    there is neither a library nor a way to build one.
    """
    if not _has_gpu():
        return None
    try:
        architecture = this_architecture()
        return find(architecture) or build(architecture)
    except CannotBuild as error:
        logger.warning("kv-compress: no CUDA kernels, Triton's instead: %s", error)
        return None


def this_architecture() -> str:
    """The current GPU's, as nvcc names it.

    Raises:
        CannotBuild: there is no NVIDIA GPU.
    """
    if not _has_gpu():
        raise CannotBuild("there is no NVIDIA GPU here: name one with --arch, such as sm_90")
    return "sm_{}{}".format(*torch.cuda.get_device_capability())


def find(architecture: str) -> Path | None:
    """A library of today's sources, in the package or else in the user's folder.

    Raises:
        CannotBuild: it is not in the package, and the user's folder cannot be used.
    """
    name = f"{_digest()}-{architecture}-*.so"
    found = sorted(IN_PACKAGE.glob(name)) or sorted(user_folder().glob(name))
    return found[0] if found else None


def build(
    architecture: str, folder: Path | None = None, sources: tuple[str, ...] = SOURCES
) -> Path:
    """Build the library into a folder, by default the user's, unless it is there.

    Args:
        architecture: as nvcc names it, such as `sm_90`.

    Raises:
        CannotBuild: no nvcc, or not for this architecture, or the folder cannot be used.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise CannotBuild("there is no nvcc here, in CUDA_HOME or in /usr/local/cuda")
    known = _run(nvcc, "--list-gpu-code").split()
    if architecture not in known:
        raise CannotBuild(f"{nvcc} builds for {', '.join(known)}, not for {architecture!r}")
    version = re.search(r"V([\d.]+)", _run(nvcc, "--version"))
    folder = folder or user_folder()
    name = f"{_digest(sources)}-{architecture}-cuda{version[1] if version else ''}.so"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f"{name}.lock"):
            if not (folder / name).exists():
                logger.info("kv-compress: building CUDA kernels for %s, once", architecture)
                with tempfile.TemporaryDirectory(dir=folder) as scratch:
                    made = _compile(nvcc, architecture, sources, Path(scratch))
                    os.replace(made, folder / name)
    except OSError as error:
        raise CannotBuild(f"{folder} cannot be written: {error}") from None
    return folder / name


def user_folder() -> Path:
    """`$XDG_CACHE_HOME/vllm-kvcompress`, made where missing, and nobody else's.

    Raises:
        CannotBuild: it cannot be made, or it is another user's or open to others, so that what
            lies in it cannot be trusted.
    """
    home = os.environ.get("XDG_CACHE_HOME", "")
    caches = Path(home if os.path.isabs(home) else os.path.expanduser("~/.cache"))
    folder = caches / "vllm-kvcompress"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise CannotBuild(f"{folder} cannot be made: {error}") from None
    mine = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
    if not mine or stat.S_IMODE(status.st_mode) & 0o077:
        raise CannotBuild(f"{folder} must be a folder of this user's with mode 0700")
    return folder


def find_nvcc() -> str | None:
    """On the path, else where CUDA is usually installed."""
    homes = (os.environ.get("CUDA_HOME"), "/usr/local/cuda")
    folders = os.pathsep.join(f"{home}/bin" for home in homes if home)
    return shutil.which("nvcc") or shutil.which("nvcc", path=folders)


def _has_gpu() -> bool:
    return torch.version.cuda is not None and torch.cuda.is_available()


@cache
def _digest(sources: tuple[str, ...] = SOURCES) -> str:
    """Of everything that the compiler reads here."""
    headers = (path for pattern in READ_BY_THEM for path in CSRC.glob(pattern))
    digest = hashlib.sha256()
    for path in sorted({*headers, *(CSRC / source for source in sources)}):
        digest.update(b"%s\0%s\0" % (str(path.relative_to(CSRC)).encode(), path.read_bytes()))
    return digest.hexdigest()[:16]


def _compile(nvcc: str, architecture: str, sources: tuple[str, ...], folder: Path) -> Path:
    to_object = partial(_to_object, nvcc, architecture, folder)
    with ThreadPoolExecutor(min(len(sources), os.cpu_count() or 1)) as pool:
        objects = list(pool.map(to_object, sources))
    library = folder / "library.so"
    _run(nvcc, "-shared", f"-arch={architecture}", *objects, "-o", library)
    return library


def _to_object(nvcc: str, architecture: str, folder: Path, source: str) -> Path:
    made = folder / f"{source.replace('/', '_')}.o"
    flags = ["-std=c++17", "-O3", f"-arch={architecture}", f"-I{CSRC}", "-Xcompiler", "-fPIC"]
    if source.startswith("codec/"):
        flags.append("-fmad=false")  # its bytes are those of the CPU's codec
    _run(nvcc, *flags, "-c", CSRC / source, "-o", made)
    return made


def _run(*command: str | Path) -> str:
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=LONGEST_S)
    except subprocess.CalledProcessError as error:
        said = [line for line in (error.stderr + error.stdout).splitlines() if line.strip()]
        raise CannotBuild(f"{command[0]} failed: {said[0] if said else error}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotBuild(f"{command[0]} failed: {error}") from None
    return ran.stdout


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
