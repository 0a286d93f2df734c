"""Without a compiler the codec is missing; its tests then say so instead of failing."""

import os

import pytest

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
