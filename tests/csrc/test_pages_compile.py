"""nvcc makes GPU code of every page kernel, alone, and no register of it spills."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc")


@pytest.mark.skipif(NVCC is None, reason="no nvcc here")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("source", ["attend.cu", "compact.cu"])
def test_page_kernel_compiles_alone_and_spills_nothing(source, architecture, tmp_path):
    command = [NVCC, "-std=c++17", "-Icsrc", f"-arch={architecture}", "-Xptxas", "-v", "-c"]
    ran = subprocess.run(
        [*command, f"csrc/pages/{source}", "-o", tmp_path / "kernel.o"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    spills = re.findall(r"(\d+) bytes spill", ran.stderr)
    assert spills and set(spills) == {"0"}
