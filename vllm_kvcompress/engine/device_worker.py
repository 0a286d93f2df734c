"""Workers whose engine reads pages token by token: those of GPUs, and of a Triton on CPUs."""

from math import ceil
from typing import Any, ClassVar

from vllm.config import set_current_vllm_config
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_kvcompress.accounting import ceil_div
from vllm_kvcompress.config import EngineConfig, parse_engine_config, uses_store
from vllm_kvcompress.engine import page_kernels
from vllm_kvcompress.engine.attention import load
from vllm_kvcompress.engine.compressor import Compressor
from vllm_kvcompress.engine.device_batch import Scratch
from vllm_kvcompress.engine.device_compressor import DeviceCompressor
from vllm_kvcompress.engine.device_judge import DeviceJudge
from vllm_kvcompress.engine.memory import ModelShape
from vllm_kvcompress.engine.worker import PerHeadWorker, mean_over_ranks
from vllm_kvcompress.kernels import Arenas
from vllm_kvcompress.paging.pool import PagePool
from vllm_kvcompress.transport.settings import ConnectorSettings

BACKENDS = {
    "FLASH_ATTN": "vllm_kvcompress.engine.backends.flash_attn.PerHeadFlashBackend",
    "TRITON_ATTN": "vllm_kvcompress.engine.backends.triton.PerHeadTritonBackend",
}


class DeviceWorker(PerHeadWorker):
    """Before a platform's worker class; `additional_config` names the engine."""

    _scratch: Scratch | None = None

    @property
    def replaced_backend(self) -> Any:  # type: ignore[override]
        return self.vllm_config.attention_config.backend  # type: ignore[attr-defined]

    @property
    def backend(self) -> type[AttentionBackend]:  # type: ignore[override]
        return resolve_obj_by_qualname(BACKENDS[self.replaced_backend.name])

    def load_model(self, **kwargs: Any) -> None:
        config = self._config()
        with set_current_vllm_config(self.vllm_config):  # type: ignore[attr-defined]
            self._engine = load(config.attention_engine)()
        self._cuda = page_kernels.load_cuda(config.kernels)
        super().load_model(**kwargs)

    def make_compressor(self, config: EngineConfig, pool: PagePool, scale: float) -> Compressor:
        rows, _, width = self._sizes()
        self._scratch = Scratch(rows, pool.num_heads, width, pool.device)
        longest = self.vllm_config.model_config.max_model_len  # type: ignore[attr-defined]
        group = self._query_heads() // pool.num_heads
        attends: tuple[str, ...] = (self._engine.name,)
        if self._engine.attend_pages is not None:
            attention = page_kernels.choose_attention(
                config.kernels, self._cuda, pool, group, self._scratch, longest
            )
            self._engine.attend_pages, attends = attention.kernel, attention.names
        compaction = page_kernels.choose_compaction(config.kernels, self._cuda, pool)
        self.kernels = {"attention": attends, "compaction": compaction.names}
        for call in page_kernels.compiling(pool, group, self._scratch, longest):
            self._engine.attend(call)
        judge = DeviceJudge(config, pool, scale, mean_over_ranks)
        return DeviceCompressor(config, pool, judge, rows, width, compaction.kernel)

    def compile_or_warm_up_model(self) -> Any:
        """Compression first: behind its own warm-up vLLM reports, or refuses, what compiles."""
        assert self.compressor is not None
        dtype = self.vllm_config.model_config.dtype  # type: ignore[attr-defined]
        self.compressor.warm_up(self._query_heads(), dtype)
        return super().compile_or_warm_up_model()  # type: ignore[misc]

    def bind(self, impl: Any, pool: PagePool, pool_layer: int) -> None:
        super().bind(impl, pool, pool_layer)
        impl.engine = self._engine

    def attach(self, builder: Any) -> None:
        super().attach(builder)
        builder.scratch = self._scratch

    def reserved_bytes(self, config: EngineConfig, available: int) -> int:
        """All that compression takes on a device, at its bounds (`engine/memory.py`)."""
        vllm_config = self.vllm_config  # type: ignore[attr-defined]
        rows, heads, width = self._sizes()
        shape = ModelShape.of(vllm_config)
        fixed = (
            super().reserved_bytes(config, available)
            + Scratch.bytes_of(rows, heads, width)
            + Arenas.bytes_of(rows, shape.layers, heads, width)
            + self._engine.workspace_bytes
            + shape.working_bytes(config, vllm_config)
        )
        if uses_store(vllm_config):
            settings = vllm_config.kv_transfer_config.kv_connector_extra_config
            fixed += ConnectorSettings.of(settings).buffer_mb << 20
        return fixed + ceil(max(0, available - fixed) * shape.positions_share())

    def _config(self) -> EngineConfig:
        vllm_config = self.vllm_config  # type: ignore[attr-defined]
        return parse_engine_config(vllm_config.additional_config["kv_compress"])

    def _query_heads(self) -> int:
        """Of this rank."""
        config = self.vllm_config  # type: ignore[attr-defined]
        return config.model_config.get_num_attention_heads(config.parallel_config)

    def _sizes(self) -> tuple[int, int, int]:
        """Rows of the largest batch, KV heads of this rank, blocks of the longest request."""
        config = self.vllm_config  # type: ignore[attr-defined]
        rows = config.scheduler_config.max_num_seqs
        compilation, graphs = config.compilation_config, 0
        if compilation.cudagraph_mode.has_full_cudagraphs():
            graphs = compilation.max_cudagraph_capture_size or 0
        heads = config.model_config.get_num_kv_heads(config.parallel_config)
        blocks = ceil_div(config.model_config.max_model_len, config.cache_config.block_size)
        return max(rows, graphs), heads, blocks


if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker

    class KVCompressDeviceWorker(DeviceWorker, CPUWorker):
        """`CPUWorker` with a Triton that runs there, in the place of `CPU_ATTN`."""

        replaced_backend: ClassVar[Any] = AttentionBackendEnum.CPU_ATTN

        @property
        def backend(self) -> type[AttentionBackend]:  # type: ignore[override]
            return resolve_obj_by_qualname(BACKENDS["TRITON_ATTN"])

else:
    from vllm.v1.worker.gpu_worker import Worker

    class KVCompressDeviceWorker(DeviceWorker, Worker):  # type: ignore[no-redef]
        """The GPU `Worker`."""
