"""The compressor where the pages are a CPU's: the same steps, by the kernels for it."""

from torch import Tensor

from vllm_kvcompress.config import EngineConfig
from vllm_kvcompress.engine.compressor import Compressor
from vllm_kvcompress.engine.cpu_judge import CPUJudge
from vllm_kvcompress.engine.cpu_kernels import CPUKernels
from vllm_kvcompress.paging.pool import PagePool


class CPUCompressor(Compressor):
    """Copies tokens by the kernel for it."""

    def __init__(
        self, config: EngineConfig, pool: PagePool, judge: CPUJudge, kernels: CPUKernels
    ) -> None:
        super().__init__(config, pool, judge)
        self._kernels = kernels

    def _copy(self, candidates: Tensor, tokens: int, kept: Tensor, arena_blocks: Tensor) -> None:
        self._kernels.copy(candidates, tokens, kept, arena_blocks)
