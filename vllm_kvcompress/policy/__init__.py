"""WHAT to keep: torch only, knows nothing of vLLM. See docs/add-a-policy.md."""

from vllm_kvcompress.policy import (
    allocators,
    attention,
    propagators,
    scorers,
    selectors,
    windows,
)
from vllm_kvcompress.policy.interfaces import Allocator, Propagator, Scorer, Selector
from vllm_kvcompress.policy.observation import Observation
from vllm_kvcompress.policy.policy import Kept, Policy
from vllm_kvcompress.policy.ranking import MarkedScores
from vllm_kvcompress.policy.registry import (
    build,
    register_allocator,
    register_propagator,
    register_scorer,
    register_selector,
)

BUILT_IN = (
    allocators,
    attention,
    propagators,
    scorers,
    selectors,
    windows,
)  # importing them registers them

__all__ = [
    "BUILT_IN",
    "Allocator",
    "Kept",
    "MarkedScores",
    "Observation",
    "Policy",
    "Propagator",
    "Scorer",
    "Selector",
    "build",
    "register_allocator",
    "register_propagator",
    "register_scorer",
    "register_selector",
]
