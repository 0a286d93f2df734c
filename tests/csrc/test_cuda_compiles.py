"""nvcc makes GPU code of every CUDA file, alone, and no register of it spills."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.cu"))]
ARCHITECTURES = (80, 90, 100)
NVCC = shutil.which("nvcc")


@pytest.mark.skipif(NVCC is None, reason="no nvcc here")
@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_cuda_file_compiles_alone_and_spills_nothing(source, tmp_path):
    command = [NVCC, "-std=c++17", "-Icsrc", "-Xptxas", "-v", "-c"]
    command += [f"-gencode=arch=compute_{n},code=sm_{n}" for n in ARCHITECTURES]
    ran = subprocess.run(
        [*command, source, "-o", tmp_path / "kernel.o"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    spills = re.findall(r"(\d+) bytes spill", ran.stderr)
    assert len(spills) >= 2 * len(ARCHITECTURES) and set(spills) == {"0"}
