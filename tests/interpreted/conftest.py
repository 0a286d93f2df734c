"""vLLM on a CPU with its Triton kernels, and ours, in Triton's interpreter.

vLLM takes Triton on a CPU only with a backend for it; here the interpreter stands for one. It
needs a process of its own (`test_kernels_apart.py`), with all of this set before vLLM is imported.
"""

import os
from types import SimpleNamespace

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # inductor would ask the stand-in for a compiler

import shutil

import pytest
import torch
from triton.backends import backends

from kernels import on_host

backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)
torch.cuda.get_device_capability = lambda device=None: (9, 0)  # asked for by vLLM's cache kernel


@pytest.fixture(scope="session")
def cuda_on_host(tmp_path_factory):
    """The CUDA kernels built for this CPU."""
    if (compiler := shutil.which("g++")) is None:
        pytest.skip("no g++ here to build the CUDA kernels for the CPU")
    return on_host.build(compiler, on_host.PAGES, tmp_path_factory.mktemp("pages"))
