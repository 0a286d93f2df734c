"""Chunks out of and into vLLM's paged CPU cache."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from vllm_kvcompress.paging.pool import PageFormat

DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


class CachePages:
    """Natural pages of all layers.

    Args:
        layers: each layer's cache `[num_blocks, H, B, 2*D]`, in the order they travel.
        probe: measures where a page's elements stand; called at the first use, when the kernel's
            choice is made.
    """

    def __init__(self, layers: Sequence[Tensor], probe: Callable[[], PageFormat]) -> None:
        self.layers, self._probe = list(layers), probe
        self._where: Tensor | None = None
        _, self.heads, self.block_tokens, content = layers[0].shape
        self.head_size = content // 2
        self.dtype = DTYPES[layers[0].dtype]
        self.block_bytes = len(layers) * layers[0][0].numel() * layers[0].element_size()

    def read(self, block_ids: Sequence[int]) -> np.ndarray:
        """A copy: `[layers, 2, tokens, heads * head size]`, 16-bit types as their bits."""
        where, blocks = self._elements(), torch.tensor(block_ids)
        tokens = len(blocks) * self.block_tokens
        out = torch.empty(len(self.layers), 2, tokens, self.heads, self.head_size,
                          dtype=self.layers[0].dtype)  # fmt: skip
        for layer, cache in enumerate(self.layers):
            pages = cache[blocks].flatten(2)  # [n, H, B*2D]
            content = pages[:, :, where].view(
                len(blocks), self.heads, 2, self.block_tokens, self.head_size
            )
            out[layer] = content.permute(2, 0, 3, 1, 4).reshape(out.shape[1:])
        return _bits(out.flatten(3))

    def write(self, block_ids: Sequence[int], kv: np.ndarray) -> None:
        """Fill whole blocks with `[layers, 2, tokens, heads * head size]`."""
        where, blocks = self._elements(), torch.tensor(block_ids)
        values = torch.from_numpy(kv)
        if values.dtype != torch.float32:
            values = values.view(self.layers[0].dtype)
        shape = len(self.layers), 2, len(blocks), self.block_tokens, self.heads, self.head_size
        by_page = values.view(shape).permute(0, 2, 4, 1, 3, 5)  # [L, n, H, 2, B, D]
        for cache, content in zip(self.layers, by_page, strict=True):
            pages = torch.empty(len(blocks), self.heads, where.numel(), dtype=cache.dtype)
            pages[:, :, where] = content.reshape(len(blocks), self.heads, -1)
            cache[blocks] = pages.view(-1, *cache.shape[1:])

    def _elements(self) -> Tensor:
        if self._where is None:
            found = self._probe()
            self._where = torch.cat([found.keys.flatten(), found.values.flatten()])
        return self._where


def _bits(values: Tensor) -> np.ndarray:
    if values.dtype == torch.float32:
        return values.numpy()
    return values.view(torch.int16).numpy().view(np.uint16)
