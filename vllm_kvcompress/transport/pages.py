"""Chunks out of and into vLLM's paged cache, on whichever device it is."""

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_kvcompress.paging.pool import PageFormat

DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


class CachePages:
    """Natural pages of all layers.

    Args:
        layers: each layer's cache `[num_blocks, H, B, 2*D]`, in the order they travel.
        page_format: where a page's elements stand; called at the first use, when the kernel's
            choice is made.
    """

    def __init__(self, layers: Sequence[Tensor], page_format: Callable[[], PageFormat]) -> None:
        self.layers, self._page_format = list(layers), page_format
        first = layers[0]
        _, self.heads, self.block_tokens, content = first.shape
        self.head_size, self.device = content // 2, first.device
        self.dtype = DTYPES[first.dtype]
        self.block_bytes = len(layers) * first[0].numel() * first.element_size()
        on_cpu = self.device.type == "cpu"  # calls cost nothing there, and caches are small
        self._parts = [layer[:, None] for layer in layers] if on_cpu else together(self.layers)

    def shape(self, blocks: int) -> tuple[int, int, int, int]:
        """Of so many blocks' tokens: `[layers, 2, tokens, heads * head size]`."""
        return len(self.layers), 2, blocks * self.block_tokens, self.heads * self.head_size

    def read(self, block_ids: Sequence[int]) -> Tensor:
        """A copy, where the cache is, of shape `shape(blocks)`. Waits for nobody."""
        blocks = self._ids(block_ids)
        out = torch.empty(self.shape(len(blocks)), dtype=self.layers[0].dtype, device=self.device)
        for part, target in zip(self._parts, self._by_token(out, len(blocks)), strict=True):
            pages = part[blocks]  # [n, l, H, B, 2*D]
            if self._where is None:
                content = pages.unflatten(-1, (2, self.head_size)).transpose(3, 4)
            else:
                size = 2, self.block_tokens, self.head_size
                content = pages.flatten(3)[..., self._where].unflatten(-1, size)
            target.copy_(content.permute(1, 3, 0, 4, 2, 5))
        return out

    def write(self, block_ids: Sequence[int], kv: Tensor) -> None:
        """Fill whole blocks with values as `read` gives them. Waits for nobody."""
        blocks = self._ids(block_ids)
        for part, source in zip(self._parts, self._by_token(kv, len(blocks)), strict=True):
            content = source.permute(2, 0, 4, 1, 3, 5)  # [n, l, H, 2, B, D]
            if self._where is None:
                pages = content.transpose(3, 4).reshape(len(blocks), *part.shape[1:])
            else:
                pages = torch.empty((len(blocks), *part.shape[1:]), dtype=part.dtype)
                pages.flatten(3)[..., self._where] = content.flatten(3)
            part[blocks] = pages

    def _by_token(self, kv: Tensor, blocks: int) -> tuple[Tensor, ...]:
        """`[layers, 2, tokens, H*D]` as one `[l, 2, n, B, H, D]` view per part."""
        view = kv.unflatten(3, (self.heads, self.head_size))
        view = view.unflatten(2, (blocks, self.block_tokens))
        return view.split([part.shape[1] for part in self._parts])

    def _ids(self, block_ids: Sequence[int]) -> Tensor:
        return async_tensor_h2d(list(block_ids), device=self.device, dtype=torch.int64)

    @cached_property
    def _where(self) -> Tensor | None:
        """int64 `[2*B*D]`: where K and V stand; None where they come token by token."""
        found = self._page_format()
        plain = PageFormat.by_token(self.block_tokens, self.head_size)
        if torch.equal(found.keys, plain.keys) and torch.equal(found.values, plain.values):
            return None
        return torch.cat([found.keys.flatten(), found.values.flatten()]).to(self.device)


def together(layers: list[Tensor]) -> list[Tensor]:
    """The layers as views `[num_blocks, l, H, B, 2*D]`: one where they are evenly spaced."""
    first = layers[0]
    alike = {(layer.untyped_storage().data_ptr(), layer.stride()) for layer in layers}
    steps = {b.storage_offset() - a.storage_offset() for a, b in pairwise(layers)}
    if len(alike) > 1 or len(steps) != 1 or min(steps) < 1:
        return [layer[:, None] for layer in layers]
    blocks, *page = first.shape
    block_stride, *strides = first.stride()
    shape, stride = (blocks, len(layers), *page), (block_stride, *steps, *strides)
    return [first.as_strided(shape, stride)]
