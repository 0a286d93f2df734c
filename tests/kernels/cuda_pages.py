"""The CUDA page kernels built for this CPU, by the C++ compiler and `cuda_on_host.h`."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc/pages").glob("*.cu"))


def build(compiler: str, folder: Path) -> Path:
    """Compile the `.cu` files as C++; returns the library.

    Raises:
        subprocess.CalledProcessError: they do not compile.
    """
    library = folder / "pages.so"
    command = [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", "-x", "c++", *SOURCES]
    command += [f"-I{ROOT / 'csrc'}", f"-I{Path(__file__).parent}", "-o", library]
    subprocess.run([*command, '-DKVC_ON_HOST="cuda_on_host.h"'], check=True)
    return library
