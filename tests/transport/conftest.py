"""Without a compiler the codec is missing; its tests then say so instead of failing."""

import os
import shutil
from pathlib import Path

import pytest

from kernels import on_host
from vllm_kvcompress.transport.codec import CodecMissing, instruction_sets

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def pytest_collection_modifyitems(items):
    try:
        instruction_sets()
    except CodecMissing as missing:
        skip = pytest.mark.skip(reason=str(missing))
        for item in items:
            if "transport" in item.path.parts:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def cuda_on_this_cpu(tmp_path_factory) -> Path:
    """The CUDA codec's own source as a library that this CPU runs thread by thread."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ here to build the CUDA kernels for the CPU")
    return on_host.build(compiler, on_host.CODEC, tmp_path_factory.mktemp("codec"))
