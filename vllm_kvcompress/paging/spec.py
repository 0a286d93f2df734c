"""The cache spec that makes vLLM manage a layer group by `PerHeadManager`.

Importing this module registers the pair in the importing process; a spec that travels between
processes is unpickled through it, so every process that meets one knows its manager.
"""

from dataclasses import dataclass

from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, replace_as
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_kvcompress.paging.manager import PerHeadManager


@dataclass(frozen=True, kw_only=True)
class PerHeadSpec(FullAttentionSpec):
    """Full attention whose prompt blocks give way to an arena of per-head pages."""


def per_head_spec(spec: AttentionSpec) -> AttentionSpec:
    """`spec` as a `PerHeadSpec` where it is plain full attention, else unchanged."""
    return replace_as(spec, PerHeadSpec) if type(spec) is FullAttentionSpec else spec


# An own entry in an empty registry would keep vLLM from ever adding its built-in ones.
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(PerHeadSpec, PerHeadManager, FullAttentionSpec)
