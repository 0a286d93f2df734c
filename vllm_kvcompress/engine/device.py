"""vLLM's GPU attention, reading kept pages for compressed requests.

Mixins before `TRITON_ATTN`'s and `FLASH_ATTN`'s own classes. A step in which every request
decodes one token is attended head by head as a whole once graphs are used, or once one of its
requests is compressed; in other steps vLLM's kernel takes all rows, the compressed ones shortened
to a stub, and the compressed rows are then written head by head.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import AttentionCGSupport, AttentionLayer, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from vllm_kvcompress.engine.attention.interface import AttentionEngine
from vllm_kvcompress.engine.batch import Sequences
from vllm_kvcompress.engine.device_batch import DeviceHeads, Scratch
from vllm_kvcompress.engine.windows import Capture
from vllm_kvcompress.engine.worker import StepView
from vllm_kvcompress.paging.device_tables import DeviceTables
from vllm_kvcompress.paging.pool import PagePool
from vllm_kvcompress.paging.spec import per_head_spec


@dataclass(frozen=True, slots=True)
class DeviceStep:
    """What the layers of a step need besides vLLM's metadata.

    everything: whether `heads` are all rows, so that vLLM's kernel has nothing to do.
    """

    heads: DeviceHeads | None
    everything: bool
    captures: list[Capture]


class HeadPathBuilder:
    """Before a metadata builder of vLLM's: attaches a `DeviceStep` to what that one builds.

    Reads no tensor of the device. `step_view` and `scratch` come once the cache is allocated.
    """

    step_view: StepView | None = None
    scratch: Scratch

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        theirs = super().get_cudagraph_support(vllm_config, kv_cache_spec)  # type: ignore[misc]
        ours = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        return min(ours, theirs, key=lambda support: support.value)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
        **options: Any,
    ) -> Any:
        common, step = common_attn_metadata, None
        if self.step_view is not None:
            step, common = self._step(self.step_view, common)
            fast_build = fast_build or step.everything  # no schedule for a kernel that is not run
            if step.heads is not None:
                common_prefix_len = 0  # compressed requests no longer hold the prefix
        metadata = super().build(common_prefix_len, common, fast_build, **options)  # type: ignore[misc]
        metadata.kv_compress = step
        return metadata

    def _step(
        self, view: StepView, common: CommonAttentionMetadata
    ) -> tuple[DeviceStep, CommonAttentionMetadata]:
        query_start = common.query_start_loc_cpu.numpy()
        request_ids, captures = view.enter(common)
        compressed = view.compressor.rows(request_ids)
        if common.max_query_len == 1:
            if not compressed and not self._captures_graphs():
                return DeviceStep(None, False, captures), common
            slots = self.scratch.enter(compressed, common.num_reqs)
            heads = self._heads(
                view, common, slots, common.block_table_tensor, common.seq_lens, None
            )
            return DeviceStep(heads, True, captures), common
        if not compressed:
            return DeviceStep(None, False, captures), common
        rows, slots_of = np.array(compressed).T
        device = common.seq_lens.device
        where = Sequences.of(rows, query_start, view.compressor.pool.num_heads).on(device)
        seq_lens, blocks = common.seq_lens[where.rows], common.block_table_tensor[where.rows]
        slots = async_tensor_h2d(slots_of.astype(np.int32), device=device)
        heads = self._heads(view, common, slots, blocks, seq_lens, where)
        stubbed = common.replace(seq_lens=_stubbed(common, where.rows))
        return DeviceStep(heads, len(rows) == common.num_reqs, captures), stubbed

    def _heads(
        self,
        view: StepView,
        common: CommonAttentionMetadata,
        slots: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        where: Sequences | None,
    ) -> DeviceHeads:
        tables = view.compressor.tables
        assert isinstance(tables, DeviceTables)
        rows = len(slots)
        return DeviceHeads(
            tables.arenas,
            self.scratch,
            slots,
            block_table[:rows],
            seq_lens[:rows],
            where,
            common.max_seq_len,
        )

    def _captures_graphs(self) -> bool:
        mode = self.vllm_config.compilation_config.cudagraph_mode  # type: ignore[attr-defined]
        return mode is not None and mode.has_full_cudagraphs()


def _stubbed(common: CommonAttentionMetadata, rows: Tensor) -> Tensor:
    """Sequence lengths that let vLLM's kernel pass quickly over the compressed rows."""
    starts = common.query_start_loc
    counts = (starts[rows + 1] - starts[rows]).to(common.seq_lens.dtype)
    return common.seq_lens.index_copy(0, rows, counts)


class HeadPathImpl:
    """Before an attention implementation of vLLM's; `bind` tells it the pool and the engine."""

    _pool: PagePool | None = None
    _pool_layer: int = 0
    _engine: AttentionEngine

    def bind(self, pool: PagePool, pool_layer: int, engine: AttentionEngine) -> None:
        """Learn which layer of the pool this is, and whose kernel reads it.

        Raises:
            ValueError: the layer's attention is not what start-up took it for.
        """
        local = tuple(self.sliding_window) != (-1, -1)  # type: ignore[attr-defined]
        if self.sinks is not None or self.alibi_slopes is not None or local:  # type: ignore[attr-defined]
            raise ValueError(
                f"kv-compress does not work with layer {pool_layer} yet: it has attention sinks, "
                "ALiBi or a sliding window; leave compression out"
            )
        self._pool, self._pool_layer, self._engine = pool, pool_layer, engine

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        return False

    def forward(
        self,
        layer: AttentionLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        step: DeviceStep | None = getattr(attn_metadata, "kv_compress", None)
        for capture in step.captures if step else ():
            capture.take(self._pool_layer, query)
        if step is None or not step.everything:
            super().forward(  # type: ignore[misc]
                layer,
                query,
                key,
                value,
                kv_cache,
                attn_metadata,
                output,
                output_scale,
                output_block_scale,
            )
        if step is not None and step.heads is not None:
            assert self._pool is not None
            step.heads.attend(self, self._engine, self._pool, self._pool_layer, query, output)
        return output


class HeadPathBackend:
    """Before an attention backend of vLLM's."""

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.BLHNC,)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        return per_head_spec(spec)
