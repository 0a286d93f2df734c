"""vLLM's CPU attention, reading kept pages for compressed requests.

Extends `vllm.v1.attention.backends.cpu_attn` and `vllm.v1.worker.cpu_worker.CPUWorker`.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionLayer, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_kvcompress.config import EngineConfig
from vllm_kvcompress.engine.attention.cpu import CPUEngine
from vllm_kvcompress.engine.attention.interface import HeadCall
from vllm_kvcompress.engine.batch import HeadBatch
from vllm_kvcompress.engine.compressor import Compressor
from vllm_kvcompress.engine.cpu_compressor import CPUCompressor
from vllm_kvcompress.engine.cpu_judge import CPUJudge
from vllm_kvcompress.engine.cpu_kernels import CPUKernels
from vllm_kvcompress.engine.per_head import PerHeadBackend, PerHeadImpl, stubbed
from vllm_kvcompress.engine.windows import Capture
from vllm_kvcompress.engine.worker import PerHeadWorker, StepView, mean_over_ranks
from vllm_kvcompress.paging.pool import PagePool


@dataclass
class PerHeadMetadata(CPUAttentionMetadata):
    """vLLM's metadata, plus the step's compressed requests and the queries to keep aside."""

    heads: HeadBatch | None = None
    captures: list[Capture] = field(default_factory=list)


class PerHeadMetadataBuilder(CPUAttentionMetadataBuilder):
    """Builds vLLM's metadata; compressed rows get a stub there and a place in `heads`."""

    step_view: StepView | None = None

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> PerHeadMetadata:
        heads, captures = None, []
        if self.step_view is not None:
            heads, captures = self.step_view.lay_out(common_attn_metadata)
        common = common_attn_metadata
        if heads is not None:
            common = stubbed(common, heads.sequences.rows)
        plain = super().build(common_prefix_len, common, fast_build)
        return PerHeadMetadata(**vars(plain), heads=heads, captures=captures)


class PerHeadAttentionImpl(PerHeadImpl, CPUAttentionBackendImpl):
    """Attention of one layer; `bind` gives it the pool."""

    def forward(
        self,
        layer: AttentionLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        plain = partial(super().forward, layer, query, key, value, kv_cache, attn_metadata, output)
        if not isinstance(attn_metadata, PerHeadMetadata):
            return plain(output_scale, output_block_scale)
        for capture in attn_metadata.captures:
            capture.take(self.pool_layer, query)
        heads = attn_metadata.heads
        if heads is None or len(heads.sequences.rows) < len(attn_metadata.seq_lens):
            plain(output_scale, output_block_scale)
        if heads is not None:
            self._attend_per_head(layer, query, output, heads)
        return output

    def _attend_per_head(
        self, layer: AttentionLayer, query: Tensor, output: Tensor, heads: HeadBatch
    ) -> None:
        """Overwrite the compressed rows of `output [T, Hq, D]`."""
        assert self.pool is not None
        group, size = self.num_queries_per_kv, self.head_size
        per_head, where = (self.num_kv_heads, group), heads.sequences
        queries = query.unflatten(1, per_head)[where.tokens, where.lanes]
        attended = torch.empty_like(queries)
        halves = self.pool.cache.view(-1, 1, 2 * self.pool.page_tokens, size).chunk(2, dim=2)
        call = HeadCall(
            queries,
            *halves,
            tables=heads.block_table(self.pool_layer),
            lengths=heads.seq_lens[self.pool_layer],
            query_start_loc=where.query_start_loc,
            most_queries=where.most_queries,
            longest=heads.longest,
            scale=self.scale,
            softcap=self.logits_soft_cap,
            out=attended,
        )
        CPUEngine(layer.isa, self.kv_cache_dtype).attend(call)  # type: ignore[attr-defined]
        output.unflatten(1, per_head)[where.tokens, where.lanes] = attended


class PerHeadCPUBackend(PerHeadBackend, CPUAttentionBackend):
    """Takes the place of `CPU_ATTN`, under its name."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return PerHeadAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return PerHeadMetadataBuilder


class KVCompressCPUWorker(PerHeadWorker, CPUWorker):
    """`CPUWorker` with per-head compression."""

    replaced_backend: ClassVar[Any] = AttentionBackendEnum.CPU_ATTN
    backend: ClassVar[type[CPUAttentionBackend]] = PerHeadCPUBackend
    kernels: ClassVar = {"attention": ("cpu",), "compaction": ("cpu",)}

    def make_compressor(self, config: EngineConfig, pool: PagePool, scale: float) -> Compressor:
        kernels = CPUKernels.of(pool)
        if kernels is None:
            return super().make_compressor(config, pool, scale)
        judge = CPUJudge(config, pool, scale, mean_over_ranks, kernels=kernels)
        return CPUCompressor(config, pool, judge, kernels)
