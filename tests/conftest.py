"""Two of these processes share two cores: each has one thread, which nothing pins to a core.

The kernels' tests stay out of them: `test_kernels_apart.py` gives those a process of their own.
"""

import os

from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

# A busy machine is no fault of a test: no deadline, and slow data is data.
settings.register_profile("random", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("repeatable", settings.get_profile("random"), derandomize=True)
settings.load_profile("repeatable")  # new cases: pytest --hypothesis-profile=random

APART = ["kernels", "interpreted", "pretended"]
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else APART


def pytest_collection_modifyitems(items):
    """Slow files come first, so that none of them is what all wait for at the end."""
    slow = {item.path for item in items if any(map(item.get_closest_marker, ("engine", "slow")))}
    items.sort(key=lambda item: item.path not in slow)
