"""Attention engines: which kernel reads the pages of the heads, and how it wants to be called.

Each engine is one module. It takes a `HeadCall`, in which every (request, KV head) is a sequence
with one KV head, and says in one line why it cannot run here.
"""

from vllm_kvcompress.engine.attention.choice import ENGINES, choose, load
from vllm_kvcompress.engine.attention.interface import AttentionEngine, HeadCall

__all__ = ["ENGINES", "AttentionEngine", "HeadCall", "choose", "load"]
