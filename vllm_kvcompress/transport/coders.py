"""A chunk's way between pages and coded bytes: on the CPU, or on the GPU that holds the pages."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from vllm.logger import init_logger

from vllm_kvcompress.transport.beside import Beside, Fence, beside
from vllm_kvcompress.transport.chunks import ChunkCodec
from vllm_kvcompress.transport.container import Container
from vllm_kvcompress.transport.pages import CachePages
from vllm_kvcompress.transport.profile import Profile
from vllm_kvcompress.transport.settings import ConnectorSettings

logger = init_logger("vllm.kv_compress.cachegen")  # vLLM shows what is below `vllm`


class Taken(NamedTuple):
    """A chunk that was copied out of its pages by the time `copied` is reached."""

    kv: Tensor  # [layers, 2, tokens, heads * head size]
    copied: Fence


class Coder(ABC):
    """`take` belongs into a step and waits for nobody; all else into threads beside it."""

    def __init__(self, codec: ChunkCodec, pages: CachePages, where: Beside) -> None:
        self.codec, self.pages, self.beside = codec, pages, where

    def take(self, block_ids: Sequence[int]) -> Taken:
        """Copy a chunk out of its pages, which may then be freed.

        Raises:
            torch.OutOfMemoryError: there is no room for the copy.
        """
        return Taken(self.pages.read(block_ids), self.beside.fence())

    @abstractmethod
    def land(self, taken: Taken) -> Any:
        """Bring it to where it is encoded."""

    @abstractmethod
    def encode(self, landed: Any, level: int, key: str) -> bytes:
        """One container."""

    @abstractmethod
    def place(
        self, container: Container, block_ids: Sequence[int], tokens: slice, ours: Fence
    ) -> None:
        """Decode a whole chunk, and fill these blocks with some of its tokens. Done on return.

        Args:
            ours: from when on nobody else writes to the blocks.

        Raises:
            CorruptChunk: it cannot be decoded; nothing was written.
        """


class HostCoder(Coder):
    """Codes on the CPU. From and to a GPU values travel as they are, by pinned memory."""

    def land(self, taken: Taken) -> np.ndarray:
        if self.beside.on_host:
            return as_array(taken.kv)
        host = self._host(taken.kv.shape)
        with self.beside.after(taken.copied):
            host.copy_(taken.kv, non_blocking=True)
        return as_array(host)

    def encode(self, landed: np.ndarray, level: int, key: str) -> bytes:
        return self.codec.encode(landed, self.pages.dtype, level, heads=self.pages.heads, key=key)

    def place(
        self, container: Container, block_ids: Sequence[int], tokens: slice, ours: Fence
    ) -> None:
        header = container.header
        host = self._host((header.layers, 2, header.tokens, header.channels))
        self.codec.decode_layers(container, 0, header.layers, as_array(host))
        with self.beside.after(ours):
            kv = host.to(self.pages.device, non_blocking=True)
            self.pages.write(block_ids, kv[:, :, tokens])

    def _host(self, shape: Sequence[int]) -> Tensor:
        pinned = self.pages.device.type != "cpu"
        return torch.empty(*shape, dtype=self.pages.layers[0].dtype, pin_memory=pinned)


class DeviceCoder(Coder):
    """Codes where the pages are, so that only coded bytes travel.

    `codec` takes and gives tensors there (`transport.cuda.CudaSections`).
    """

    def land(self, taken: Taken) -> Taken:
        return taken

    def encode(self, landed: Taken, level: int, key: str) -> bytes:
        with self.beside.after(landed.copied):
            return self.codec.encode(
                as_bits(landed.kv), self.pages.dtype, level, heads=self.pages.heads, key=key
            )

    def place(
        self, container: Container, block_ids: Sequence[int], tokens: slice, ours: Fence
    ) -> None:
        header, of_cache = container.header, self.pages.layers[0]
        with self.beside.after(ours):
            shape = header.layers, 2, header.tokens, header.channels
            kv = torch.empty(shape, dtype=of_cache.dtype, device=of_cache.device)
            self.codec.decode_layers(container, 0, header.layers, as_bits(kv))
            self.pages.write(block_ids, kv[:, :, tokens])


def coder(settings: ConnectorSettings, profile: Profile | None, pages: CachePages) -> Coder:
    """By the CUDA kernels where there is a library of them, else by the CPU. Says so in the log.

    Raises:
        CodecMissing: the CPU's codec was not built.
    """
    where = beside(pages.device)
    if library := library_for(pages.device):
        from vllm_kvcompress.transport.cuda import CudaSections

        logger.info("CacheGen codes chunks on %s by %s", pages.device, library)
        sections = CudaSections(library, pages.device)
        codec = ChunkCodec(profile, settings.quantiser, sections=sections)
        return DeviceCoder(codec, pages, where)
    codec = ChunkCodec(profile, settings.quantiser, settings.threads)
    isa, threads = codec.sections.isa, settings.threads
    logger.info("CacheGen codes chunks on the CPU by %s, threads: %d", isa, threads)
    return HostCoder(codec, pages, where)


def library_for(device: torch.device) -> Path | None:
    """The codec's CUDA kernels for this device, built now where they can be and are not yet."""
    if device.type != "cuda":
        return None
    from vllm_kvcompress.kernels.library import cuda_library

    return cuda_library()


def as_bits(values: Tensor) -> Tensor:
    """The same memory as int16 or int32."""
    return values.view(torch.int32 if values.element_size() == 4 else torch.int16)


def as_array(values: Tensor) -> np.ndarray:
    """The same memory as the codec for CPUs wants it: float32, or uint16 bits."""
    if values.dtype == torch.float32:
        return values.numpy()
    return as_bits(values).numpy().view(np.uint16)
