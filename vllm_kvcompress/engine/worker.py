"""The worker, for any platform: build the pool, show the compressor each step, time it.

Extends vLLM's `Worker` by cooperative inheritance; a platform adds its attention backend
(`engine/cpu.py`). The model runner is read, never changed (`engine/runners.py`).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from vllm.config import get_layers_from_vllm_config
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention import selector
from vllm.v1.attention.backend import AttentionBackend, CommonAttentionMetadata
from vllm.v1.attention.backends.registry import register_backend
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig

from vllm_kvcompress.config import EngineConfig, parse_engine_config
from vllm_kvcompress.engine.batch import HeadBatch
from vllm_kvcompress.engine.compressor import Compressor
from vllm_kvcompress.engine.judge import Judge
from vllm_kvcompress.engine.propagation import Propagation
from vllm_kvcompress.engine.runners import ANY, FULL, Runner, runner_of
from vllm_kvcompress.engine.stash import Stash
from vllm_kvcompress.engine.stats import WorkerStats
from vllm_kvcompress.engine.windows import Capture
from vllm_kvcompress.paging.formats import page_format
from vllm_kvcompress.paging.pool import PagePool

logger = init_logger("vllm.kv_compress.worker")  # vLLM shows what is below `vllm`


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows whose metadata is built apart from the step's batch."""

    request_ids: Sequence[str]
    captures: list[Capture]


class StepView:
    """What a metadata builder asks: which rows of this step's batch are compressed.

    `common` and `request_ids` are those of the step's whole batch, row by row.
    """

    common: CommonAttentionMetadata
    request_ids: Sequence[str]

    def __init__(self, compressor: Compressor, runner: Runner, attn_groups: Any) -> None:
        self.compressor = compressor
        self._runner = runner
        self._attn_groups = attn_groups
        self._part: _Part | None = None

    def block_ids(self, request_id: str) -> list[int]:
        """Natural block ids of a request, arena excluded."""
        return self._runner.block_ids(request_id)

    def lay_out(self, common: CommonAttentionMetadata) -> tuple[HeadBatch | None, list[Capture]]:
        """See `Compressor.lay_out`. Dummy runs have no requests and are laid out as plain."""
        request_ids, aside = self.enter(common)
        query_start = common.query_start_loc_cpu.numpy()
        seq_lens = common.seq_lens_cpu_upper_bound.numpy()
        heads = self.compressor.lay_out(request_ids, query_start, seq_lens, self.block_ids)
        return heads, aside

    def enter(self, common: CommonAttentionMetadata) -> tuple[Sequence[str], list[Capture]]:
        """Whose rows metadata is built for, and the queries among them to keep aside."""
        if self._part is not None:
            return self._part.request_ids, self._part.captures
        self.common, self.request_ids = common, self._runner.request_ids(common.num_reqs)
        query_start = common.query_start_loc_cpu.numpy()
        return self.request_ids, self.compressor.captures(self.request_ids, query_start)

    def build(
        self,
        request_ids: Sequence[str],
        counts: list[int],
        ends: np.ndarray,
        seq_lens: Tensor,
        block_table: Tensor,
        slots: Tensor,
        captures: list[Capture] | None = None,
    ) -> Any:
        """Metadata for part of the step's batch, or for rows that are not in it.

        Args:
            request_ids: the rows' requests where they stand in the batch, else none.
            counts: tokens of each row.
            ends, seq_lens: int32 `[R]` tokens once the step is done, on the host and as attention
                reads them.
            block_table: int32 `[R, blocks]` natural blocks.
            slots: `[T]` where keys and values go.
            captures: queries to keep aside; None: the step's own of these requests.
        """
        whole = self.common
        starts = np.cumsum([0, *counts], dtype=np.int32)
        if captures is None:
            captures = self.compressor.captures(request_ids, starts)
        part = whole.replace(
            query_start_loc=async_tensor_h2d(starts, device=whole.seq_lens.device),
            query_start_loc_cpu=torch.from_numpy(starts),
            seq_lens=seq_lens,
            seq_lens_cpu_upper_bound=torch.from_numpy(ends),
            num_reqs=len(counts),
            num_actual_tokens=sum(counts),
            max_query_len=max(counts),
            max_seq_len=int(ends.max()),
            block_table_tensor=block_table,
            slot_mapping=slots,
            is_prefilling=None,
            positions=None,
            req_idx=None,
            _num_computed_tokens_cache=None,
            _token_to_req_indices_cache=None,
        )
        self._part = _Part(request_ids, captures)
        try:
            return self._attn_groups[0][0].metadata_builders[0].build(0, part)
        finally:
            self._part = None


class PerHeadWorker:
    """Mixin before a platform's worker class."""

    replaced_backend: ClassVar[Any]
    backend: ClassVar[type[AttentionBackend]]
    kernels: Mapping[str, Sequence[str]]
    """Whose kernels run, by what they do."""
    compressor: Compressor | None = None
    propagation: Propagation | None = None

    def make_compressor(self, config: EngineConfig, pool: PagePool, scale: float) -> Compressor:
        """The compressor of this worker's pages."""
        return Compressor(config, pool, Judge(config, pool, scale, mean_over_ranks))

    def bind(self, impl: Any, pool: PagePool, pool_layer: int) -> None:
        """Tell a layer's attention where its pages are."""
        impl.bind(pool, pool_layer)

    def attach(self, builder: Any) -> None:
        """Tell a metadata builder whom to ask."""
        builder.step_view = self._view

    def reserved_bytes(self, config: EngineConfig, available: int) -> int:
        """Memory to keep from the `available` bytes: the stash of token-selective propagation."""
        if not config.tsp_max_inflight_tokens:
            return 0
        return Stash.bytes_of(*self._stash_shape(config))

    def load_model(self, **kwargs: Any) -> None:
        with _backend_in_place_of(self.replaced_backend, self.backend):
            super().load_model(**kwargs)  # type: ignore[misc]

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        super().initialize_from_config(kv_cache_config)  # type: ignore[misc]
        vllm_config, runner = self.vllm_config, self.model_runner  # type: ignore[attr-defined]
        (group,) = kv_cache_config.kv_cache_groups
        layers = get_layers_from_vllm_config(vllm_config, Attention, group.layer_names)
        caches = [layer.kv_cache for layer in layers.values()]
        first = next(iter(layers.values()))
        pool = PagePool(caches, page_format(first, caches[0]))
        config = parse_engine_config(vllm_config.additional_config["kv_compress"])
        self.compressor = self.make_compressor(config, pool, first.impl.scale)
        self._kernels_to_tell = self.kernels
        self._runner = runner_of(runner)
        self._view = StepView(self.compressor, self._runner, runner.attn_groups)
        for layer in layers.values():
            self.bind(layer.impl, pool, pool.layer_of(layer.kv_cache))
        for groups in runner.attn_groups:
            for attention_group in groups:
                for builder in attention_group.metadata_builders:
                    self.attach(builder)

        if config.tsp_max_inflight_tokens:
            self.propagation = Propagation(
                runner.get_model(),
                self.compressor,
                self._view,
                Stash(*self._stash_shape(config), pool.device),
                vllm_config.scheduler_config.max_num_batched_tokens,
            )

    def determine_available_memory(self) -> int:
        """vLLM's answer less what compression takes for itself.

        Raises:
            ValueError: nothing is left.
        """
        available = super().determine_available_memory()  # type: ignore[misc]
        vllm_config = self.vllm_config  # type: ignore[attr-defined]
        config = parse_engine_config(vllm_config.additional_config["kv_compress"])
        reserved = self.reserved_bytes(config, available)
        if reserved >= available:
            raise ValueError(
                f"kv-compress takes {reserved} bytes of the {available} for the KV cache: give a "
                "smaller --max-model-len, tsp_max_inflight_tokens (now "
                f"{config.tsp_max_inflight_tokens}; 0 for no TSP) or window_max_inflight_tokens "
                f"(now {config.window_max_inflight_tokens})"
            )
        logger.info("kv-compress keeps %d MiB for compressing", reserved >> 20)
        return available - reserved

    def _stash_shape(self, config: EngineConfig) -> tuple[int, int, torch.dtype]:
        assert config.tsp_max_inflight_tokens is not None
        model_config = self.vllm_config.model_config  # type: ignore[attr-defined]
        hidden = model_config.get_hidden_size()
        return config.tsp_max_inflight_tokens, hidden, model_config.dtype

    @torch.inference_mode()
    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        compressor, propagation = self.compressor, self.propagation
        assert compressor is not None
        compressor.begin_step(scheduler_output)
        self._runner.begin_step(scheduler_output)
        selecting: AbstractContextManager[None] = nullcontext()
        if propagation is not None:
            propagation.begin_step(scheduler_output)
            selecting = propagation.around_step()
        graphs: AbstractContextManager[None] = nullcontext()
        if compressor.propagating:
            graphs = self._runner.without_graphs(ANY)
        elif compressor.keeps_queries:
            graphs = self._runner.without_graphs(FULL)
        with selecting, graphs:
            output = super().execute_model(scheduler_output)  # type: ignore[misc]
        compressor.finish_step(self._view.block_ids)
        if output is None:  # the step's output is still to come
            self._runner.send(WorkerStats.of(compressor.clock.take(), self._kernels_to_tell))
            self._kernels_to_tell = {}
        return output

    def sample_tokens(self, grammar_output: Any) -> Any:
        output = super().sample_tokens(grammar_output)  # type: ignore[misc]
        self._runner.complete(output)
        return output

    def check_kv_compress_integrity(self) -> None:
        """For `collective_rpc`: raise where the worker's page tables do not add up."""
        assert self.compressor is not None
        self.compressor.check_integrity()


def mean_over_ranks(own: Tensor) -> Tensor:
    """The mean of the tensor-parallel ranks' tensors, to the bit the same on every rank."""
    ranks = get_tensor_model_parallel_world_size()
    if ranks == 1:
        return own
    return tensor_model_parallel_all_gather(own[None], dim=0).mean(dim=0)


@contextmanager
def _backend_in_place_of(replaced: Any, backend: type[AttentionBackend]) -> Iterator[None]:
    """Select `backend` for the layers built inside; engines built later are not affected."""
    register_backend(replaced, f"{backend.__module__}.{backend.__qualname__}")
    selector._cached_get_attn_backend.cache_clear()
    try:
        yield
    finally:
        replaced.clear_override()
        selector._cached_get_attn_backend.cache_clear()
