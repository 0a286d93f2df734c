import os

import pytest


@pytest.fixture(scope="session")
def engine_environment() -> dict[str, str]:
    """For processes with an engine: one thread, a small cache, no chatter."""
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
