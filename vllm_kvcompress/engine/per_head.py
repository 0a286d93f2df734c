"""What every platform's attention adds to vLLM's own where its pages are read head by head."""

from typing import Any

from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from vllm_kvcompress.paging.pool import PagePool
from vllm_kvcompress.paging.spec import per_head_spec

NO_WINDOW = (-1, (-1, -1))  # as implementations of vLLM's say it


class PerHeadBackend:
    """Before an attention backend of vLLM's: the block-outermost layout, and our manager."""

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.BLHNC,)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        return per_head_spec(spec)


class PerHeadImpl:
    """Before an attention implementation of vLLM's, which is one layer's."""

    pool: PagePool | None = None
    pool_layer: int = 0
    sinks: Any
    alibi_slopes: Any
    sliding_window: Any

    def bind(self, pool: PagePool, pool_layer: int) -> None:
        """Learn, once the cache is allocated, which layer of the pool this is.

        Raises:
            ValueError: the layer's attention is not what start-up took it for.
        """
        local = self.sliding_window not in NO_WINDOW
        if self.sinks is not None or self.alibi_slopes is not None or local:
            raise ValueError(
                f"kv-compress does not work with layer {pool_layer} yet: it has attention sinks, "
                "ALiBi or a sliding window; leave compression out"
            )
        self.pool, self.pool_layer = pool, pool_layer


def stubbed(common: CommonAttentionMetadata, rows: Tensor) -> CommonAttentionMetadata:
    """The batch with sequence lengths that let vLLM's kernel pass quickly over some rows."""
    starts = common.query_start_loc
    counts = (starts[rows + 1] - starts[rows]).to(common.seq_lens.dtype)
    return common.replace(seq_lens=common.seq_lens.index_copy(0, rows, counts))
