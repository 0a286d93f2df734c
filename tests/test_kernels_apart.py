"""The kernel tests, in a process of their own: vLLM and Triton's interpreter do not mix."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="they run in this process")
def test_kernels_in_triton_interpreter():
    pytest_here = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [*pytest_here, TESTS / "kernels"],
        cwd=TESTS.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    print(ran.stdout[-6000:], ran.stderr[-2000:])
    assert ran.returncode == 0
