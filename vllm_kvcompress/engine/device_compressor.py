"""The compressor where the pages are on a GPU: the same steps, by the kernels for it."""

from collections.abc import Callable

from torch import Tensor

from vllm_kvcompress.config import EngineConfig
from vllm_kvcompress.engine.compressor import Compressor
from vllm_kvcompress.engine.judge import Judge
from vllm_kvcompress.kernels import compact, split_pages
from vllm_kvcompress.paging.device_tables import DeviceTables
from vllm_kvcompress.paging.pool import PagePool


class DeviceCompressor(Compressor):
    """Copies tokens and keeps tables on the device of the pool.

    Args:
        most_requests, most_blocks: see `DeviceTables`.
        copy: does what `kernels.compact` does.
    """

    tables: DeviceTables

    def __init__(
        self,
        config: EngineConfig,
        pool: PagePool,
        judge: Judge,
        most_requests: int,
        most_blocks: int,
        copy: Callable[..., None] = compact,
    ) -> None:
        self._sizes, self._compact = (most_requests, most_blocks), copy
        super().__init__(config, pool, judge)
        self._keys, self._values = split_pages(pool.cache)

    def _new_tables(self) -> DeviceTables:
        return DeviceTables(self.pool, *self._sizes)

    def _copy(self, candidates: Tensor, tokens: int, kept: Tensor, arena_blocks: Tensor) -> None:
        self._compact(self._keys, self._values, candidates, tokens, kept, arena_blocks)
