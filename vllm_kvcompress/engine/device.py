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

from vllm_kvcompress.engine.attention.interface import AttentionEngine
from vllm_kvcompress.engine.batch import Sequences
from vllm_kvcompress.engine.device_batch import DeviceHeads, Scratch
from vllm_kvcompress.engine.per_head import PerHeadImpl, stubbed
from vllm_kvcompress.engine.windows import Capture
from vllm_kvcompress.engine.worker import StepView
from vllm_kvcompress.paging.device_tables import DeviceTables


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
        step = DeviceStep(heads, len(rows) == common.num_reqs, captures)
        return step, stubbed(common, where.rows)

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


class HeadPathImpl(PerHeadImpl):
    """Attention of one layer; `bind` gives it the pool, and `engine` is whose kernel reads it."""

    engine: AttentionEngine

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
            capture.take(self.pool_layer, query)
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
            assert self.pool is not None
            step.heads.attend(self, self.engine, self.pool, self.pool_layer, query, output)
        return output
