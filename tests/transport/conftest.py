"""Without a compiler the codec is missing; its tests then say so instead of failing."""

import shutil
from pathlib import Path

import pytest

from kernels import on_host
from vllm_kvcompress.transport.codec import CodecMissing, instruction_sets


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
