import os

import pytest


@pytest.fixture(scope="session")
def engine_environment() -> dict[str, str]:
    """For servers as users start them: the engine and its worker in processes of their own."""
    return os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
