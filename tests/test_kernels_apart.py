"""The kernel tests, in processes of their own: vLLM and Triton's interpreter do not mix."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="they run in this process"
    ),
    pytest.mark.slow,
    pytest.mark.timeout(3600),
]


def test_kernels_in_triton_interpreter():
    assert passed_in_interpreter("kernels") > 100


def test_gpu_engine_in_triton_interpreter():
    assert passed_in_interpreter("interpreted") >= 45


def test_gpu_worker_on_a_pretended_gpu():
    assert passed_in_interpreter("pretended") >= 30


def test_kernels_compile_for_gpus_without_spilling_registers():
    figures = json.loads(run(TESTS / "kernels/gpu_code.py"))
    assert {name.split()[-1] for name in figures} == {"sm_80", "sm_90", "sm_100"}
    assert not {name: of for name, of in figures.items() if of["spilled_bytes"]}


def passed_in_interpreter(folder):
    """How many tests of a folder passed; none may fail."""
    pytest_apart = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]
    said = run(*pytest_apart, TESTS / folder, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    return int(re.search(r"(\d+) passed", said)[1])


def run(*arguments, **environment):
    command = [sys.executable, "-P", *arguments]
    ran = subprocess.run(
        command,
        cwd=TESTS.parent,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    print(ran.stdout[-6000:], ran.stderr[-2000:])
    assert ran.returncode == 0
    return ran.stdout
