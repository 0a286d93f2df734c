"""Small page pools made by hand, and page packings that no kernel here has."""

from itertools import product

import torch
from torch import Tensor

from vllm_kvcompress.paging.pool import PageFormat, PagePool


def layer_views(
    blocks: int, layers: int, heads: int, tokens: int, size: int, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """One block-outermost allocation, as `layers` views `[blocks, H, B, 2*D]`, all zero."""
    page = tokens * 2 * size
    flat = torch.zeros(blocks * layers * heads * page, dtype=dtype)
    stride = (layers * heads * page, page, 2 * size, 1)
    return [
        flat.as_strided((blocks, heads, tokens, 2 * size), stride, layer * heads * page)
        for layer in range(layers)
    ]


def linear(tokens: int, size: int) -> PageFormat:
    """A token's key and value side by side, as GPUs keep them."""
    where = torch.arange(tokens * 2 * size).view(tokens, 2 * size)
    return PageFormat(where[:, :size].clone(), where[:, size:].clone())


def halves_with_transposed_keys(tokens: int, size: int) -> PageFormat:
    """First all keys as `[D, B]`, then all values as `[B, D]`: vLLM's `vec` packing."""
    keys = torch.arange(tokens * size).view(size, tokens).T
    values = tokens * size + torch.arange(tokens * size).view(tokens, size)
    return PageFormat(keys.contiguous(), values)


def tiles(tokens: int, size: int) -> PageFormat:
    """Keys `[B/4, D/2, 4, 2]`, values `[D/4, B/2, 4, 2]`: tiles of pairs, as AMX wants them."""
    keys = torch.empty(tokens, size, dtype=torch.int64)
    values = torch.empty_like(keys)
    for token, lane in product(range(tokens), range(size)):
        keys[token, lane] = ((token // 4 * (size // 2) + lane // 2) * 4 + token % 4) * 2 + lane % 2
        tile = (lane // 4 * (tokens // 2) + token // 2) * 4 + lane % 4
        values[token, lane] = tokens * size + tile * 2 + token % 2
    return PageFormat(keys, values)


PACKINGS = {"linear": linear, "transposed": halves_with_transposed_keys, "tiles": tiles}


def filled_pool(
    blocks: int, layers: int, heads: int, tokens: int, size: int, packing: str
) -> tuple[PagePool, Tensor, Tensor]:
    """A pool of distinct numbers, and its keys and values `[pages, B, D]`, read one by one."""
    views = layer_views(blocks, layers, heads, tokens, size)
    form = PACKINGS[packing](tokens, size)
    pool = PagePool(views, form)
    flat = pool.cache.view(blocks * layers * heads, -1)
    flat.copy_(torch.arange(flat.numel(), dtype=torch.float32).view_as(flat))
    return pool, flat[:, form.keys].clone(), flat[:, form.values].clone()
