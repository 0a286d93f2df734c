"""`attention_engine`: the engine asked for, or the first of a stated order that runs here."""

from importlib import import_module
from typing import Any

from vllm_kvcompress.config import ATTENTION_ENGINES
from vllm_kvcompress.engine.attention.interface import AttentionEngine
from vllm_kvcompress.knobs import AUTO

ENGINES = {
    "cpu": "CPUEngine",
    "flash_attn": "FlashAttentionEngine",
    "triton": "TritonEngine",
    "flashinfer": "FlashInferEngine",
    "xformers": "XFormersEngine",
}


def load(name: str) -> type[AttentionEngine]:
    """The class of an engine by its name; its own packages are imported when it is made."""
    return getattr(import_module(f"vllm_kvcompress.engine.attention.{name}"), ENGINES[name])


def choose(
    name: str, platform: Any, dtype: str = "auto", beside: str | None = None
) -> type[AttentionEngine]:
    """The engine of this name, for `auto` the first of `ATTENTION_ENGINES` that runs here.

    Args:
        dtype: the model's, as it was asked for.
        beside: a backend of vLLM's that `auto` has to work beside.

    Raises:
        ValueError: it cannot run here, or none can; one line with the reasons.
    """
    if name != AUTO:
        engine = load(name)
        if reason := engine.obstacle(platform, dtype):
            raise ValueError(f"attention_engine={name} cannot run here: {reason}")
        return engine
    reasons = []
    for candidate in ATTENTION_ENGINES:
        engine = load(candidate)
        reason = engine.obstacle(platform, dtype)
        if reason is None and beside not in (None, *engine.beside):
            reason = f"it does not work beside {beside}"
        if reason is None:
            return engine
        reasons.append(f"{candidate}: {reason}")
    raise ValueError(f"no attention engine runs here ({'; '.join(reasons)})")
