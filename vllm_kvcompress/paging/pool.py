"""The whole cache of one worker as a pool of equal pages, and how to read and copy them.

A block of the block-outermost layout holds `L * H` pages of `B` tokens, so
`page = block * L * H + layer * H + head`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d

# Most elements gathered at once while copying: bounds the scratch memory of a compaction.
COPY_ELEMENTS = 1 << 24

WritePage = Callable[[Tensor, Tensor, Tensor], None]
"""Writes keys and values `[B, 1, D]` to slots `0..B-1` of a `[1, 1, B, 2*D]` cache."""


@dataclass(frozen=True)
class PageFormat:
    """Where the elements of a page stand: int64 `[B, D]` each, indices into its `2*B*D`.

    Kernels pack pages as they like (the CPU's keys are transposed), so the format is measured:
    `probe` lets the kernel write one page and reads it back.
    """

    keys: Tensor
    values: Tensor

    @staticmethod
    def by_token(page_tokens: int, head_size: int) -> "PageFormat":
        """A token's value right behind its key, token by token: what GPU kernels read."""
        elements = torch.arange(2 * page_tokens * head_size)
        keys, values = elements.view(page_tokens, 2, head_size).unbind(1)
        return PageFormat(keys, values)

    @staticmethod
    def probe(
        write: WritePage, page_tokens: int, head_size: int, dtype: torch.dtype
    ) -> "PageFormat":
        """Write pages whose elements spell their own coordinates and find each element again.

        Digits to base 64 are exact in every cache dtype.

        Raises:
            RuntimeError: the kernel's pages are not a permutation of their elements.
        """
        elements = page_tokens * head_size
        address = torch.zeros(2 * elements, dtype=torch.int64)
        ordinal = torch.arange(2 * elements).view(2, page_tokens, 1, head_size)
        scale = 1
        while scale < 2 * elements:
            digits = (ordinal // scale % 64).to(dtype)
            page = torch.zeros(1, 1, page_tokens, 2 * head_size, dtype=dtype)
            write(digits[0], digits[1], page)
            address += page.flatten().to(torch.int64) * scale
            scale *= 64
        where = torch.argsort(address)
        if not torch.equal(address[where], torch.arange(2 * elements)):
            raise RuntimeError("kv-compress cannot read this kernel's pages: not a permutation")
        keys, values = where.view(2, page_tokens, head_size)
        return PageFormat(keys, values)


class PagePool:
    """Pages of all layers and KV heads of this worker.

    Args:
        layer_caches: each layer's cache view `[num_blocks, H, B, 2*D]`, in any order.
        page_format: where a page's elements stand.

    Raises:
        RuntimeError: the views are not one block-outermost allocation.
    """

    def __init__(self, layer_caches: list[Tensor], page_format: PageFormat) -> None:
        first = min(layer_caches, key=lambda cache: cache.storage_offset())
        blocks, heads, tokens, content = first.shape
        page_elements = tokens * content
        layers = len(layer_caches)
        self.num_layers, self.num_heads, self.num_blocks = layers, heads, blocks
        self.page_tokens, self.head_size = tokens, content // 2
        self.pages_per_block = layers * heads
        self._base = first.storage_offset()
        stride = (self.pages_per_block * page_elements, page_elements, content, 1)
        offsets = sorted(cache.storage_offset() - self._base for cache in layer_caches)
        expected = [layer * heads * page_elements for layer in range(layers)]
        if any(cache.stride() != stride for cache in layer_caches) or offsets != expected:
            raise RuntimeError(
                f"the cache is not one pool of pages: layer offsets {offsets[:3]}... with strides "
                f"{first.stride()}, expected offsets {expected[:3]}... with strides {stride}"
            )
        self._flat = first.as_strided(
            (blocks * self.pages_per_block, page_elements), (page_elements, 1), self._base
        )
        self.device = first.device
        self.page_format = page_format
        self.cache = self._flat.view(-1, 1, tokens, content)  # as the kernels see it
        self._keys = _PageHalf(self._flat, page_format.keys)
        self._values = _PageHalf(self._flat, page_format.values)

    @property
    def pages(self) -> Tensor:
        """Every page as its elements, `[num_blocks * L * H, 2 * B * D]`."""
        return self._flat

    def ids(self, block_ids: list[int]) -> Tensor:
        """int64 `[len(block_ids)]` where the pool is, without waiting for the device."""
        return async_tensor_h2d(block_ids, device=self.device, dtype=torch.int64)

    def layer_of(self, layer_cache: Tensor) -> int:
        """The layer's place in the pool, taken from where its cache begins."""
        offset = layer_cache.storage_offset() - self._base
        return offset // (self.num_heads * self._flat.shape[1])

    def page_ids(self, block_ids: Tensor) -> Tensor:
        """Natural pages of blocks `[...]` as int64 `[L, H, ...]`."""
        lane = torch.arange(self.pages_per_block, device=self.device).view(
            self.num_layers, self.num_heads, *[1] * block_ids.dim()
        )
        return block_ids * self.pages_per_block + lane

    def block_pages(self, block_ids: Tensor) -> Tensor:
        """All pages of blocks `[K]`, block by block: int64 `[K*L*H]`."""
        lane = torch.arange(self.pages_per_block, device=self.device)
        return (block_ids[:, None] * self.pages_per_block + lane).flatten()

    def keys(self, pages: Tensor) -> Tensor:
        """Keys of pages `[H, P]` as `[H, P*B, D]`."""
        return self._keys.read(pages)

    def values(self, pages: Tensor) -> Tensor:
        """Values of pages `[H, P]` as `[H, P*B, D]`."""
        return self._values.read(pages)

    def copy_tokens(self, pages: Tensor, offsets: Tensor, target_pages: Tensor) -> None:
        """Copy tokens, K and V, into pages: the out-of-place compaction.

        Args:
            pages, offsets: int64 `[T]`, where the tokens are, target page by target page.
            target_pages: int64 `[T / B]`; none of them may hold a source.
        """
        step = max(1, COPY_ELEMENTS // self._flat.shape[1])
        for start in range(0, len(target_pages), step):
            targets = target_pages[start : start + step]
            tokens = slice(start * self.page_tokens, (start + step) * self.page_tokens)
            for half in (self._keys, self._values):
                half.write(targets, half.read_tokens(pages[tokens], offsets[tokens]))


class _PageHalf:
    """The keys, or the values, of every page.

    Most kernels keep a token's lanes side by side, or one lane's tokens: such rows are gathered
    whole, other packings element by element.
    """

    def __init__(self, flat: Tensor, where: Tensor) -> None:
        self._flat = flat  # [pages, 2*B*D]
        self._where = async_tensor_h2d(where, device=flat.device)
        self._lane_major = len(where) > 1 and int(where[1, 0] - where[0, 0]) == 1
        rows = where.T if self._lane_major else where
        count, width = rows.shape
        start, stride = int(rows[0, 0]), int(rows[-1, 0] - rows[0, 0]) // max(1, count - 1)
        regular = start + torch.arange(count)[:, None] * stride + torch.arange(width)
        self._in_rows = torch.equal(rows, regular) and not any(
            number % width for number in (start, stride, flat.shape[1])
        )
        if self._in_rows:
            begin = flat.storage_offset() + start
            shape, strides = (len(flat), count, width), (flat.stride(0), stride, 1)
            view = flat.as_strided(shape, strides, begin)
            self._view = view.mT if self._lane_major else view  # [pages, B, D]
            self._rows = flat.view(-1, width)
            self._rows_per_page = flat.shape[1] // width
            self._rows_of_page = async_tensor_h2d(rows[:, 0] // width, device=flat.device)

    def read(self, pages: Tensor) -> Tensor:
        """`[H, P]` pages -> `[H, P*B, D]`, in memory as it came cheapest."""
        (heads, count), (tokens, head_size) = pages.shape, self._where.shape
        if not self._in_rows:
            content = self._flat.index_select(0, pages.flatten())
            return content[:, self._where].view(heads, count * tokens, head_size)
        first = pages * self._rows_per_page
        if self._lane_major:
            lanes = first[:, None] + self._rows_of_page[:, None]  # [H, D, P]
            content = self._rows.index_select(0, lanes.flatten())
            return content.view(heads, head_size, count * tokens).transpose(1, 2)
        rows = first[..., None] + self._rows_of_page  # [H, P, B]
        return self._rows.index_select(0, rows.flatten()).view(heads, count * tokens, head_size)

    def read_tokens(self, pages: Tensor, offsets: Tensor) -> Tensor:
        """`[T]` pages and offsets in them -> `[T, D]`."""
        if not self._in_rows:
            return self._flat[pages[:, None], self._where[offsets]]
        if self._lane_major:
            return self._view[pages, offsets]
        rows = pages * self._rows_per_page + self._rows_of_page[offsets]
        return self._rows.index_select(0, rows)

    def write(self, pages: Tensor, tokens: Tensor) -> None:
        """Fill whole pages `[P]` with tokens `[P*B, D]`."""
        content = tokens.view(len(pages), *self._where.shape)
        if self._in_rows:
            self._view[pages] = content
        else:
            self._flat[pages[:, None, None], self._where] = content
