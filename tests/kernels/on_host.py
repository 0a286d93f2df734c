"""The CUDA kernels built for this CPU, by the C++ compiler and `cuda_on_host.h`."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

CSRC = Path(__file__).parents[2] / "csrc"
PAGES = sorted((CSRC / "pages").glob("*.cu"))
CODEC = [*sorted((CSRC / "codec").glob("*.cu")), CSRC / "codec/tables.cpp"]


def build(compiler: str, sources: Sequence[Path], folder: Path) -> Path:
    """Compile the sources as C++; returns the library.

    Raises:
        subprocess.CalledProcessError: they do not compile.
    """
    library = folder / "kernels.so"
    command = [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", "-ffp-contract=off"]
    command += ["-x", "c++", *sources, f"-I{CSRC}", f"-I{Path(__file__).parent}", "-o", library]
    subprocess.run([*command, '-DKVC_ON_HOST="cuda_on_host.h"'], check=True)
    return library
