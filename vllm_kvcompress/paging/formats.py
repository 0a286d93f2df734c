"""How vLLM's attention kernels pack the pages of a layer."""

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionLayer

from vllm_kvcompress.paging.pool import PageFormat

BY_TOKEN = ("FLASH_ATTN", "TRITON_ATTN")
PROBED = "CPU_ATTN"


def page_format(layer: AttentionLayer, cache: Tensor) -> PageFormat:
    """Where the elements of this layer's pages stand.

    The CPU's kernel writes one and is read back: ask once the engine's metadata builders exist,
    which choose that kernel.

    Args:
        cache: the layer's cache `[num_blocks, H, B, 2*D]`.

    Raises:
        ValueError: pages of this layer's attention backend are not known here.
        RuntimeError: see `PageFormat.probe`.
    """
    _, _, page_tokens, content = cache.shape
    name = layer.attn_backend.get_name()  # type: ignore[attr-defined]
    if name in BY_TOKEN:
        return PageFormat.by_token(page_tokens, content // 2)
    if name != PROBED:
        known = ", ".join((PROBED, *BY_TOKEN))
        raise ValueError(
            f"kv-compress cannot read pages of {name}: set --attention-backend to one of {known}"
        )
    from vllm import _custom_ops as ops

    def write(keys: Tensor, values: Tensor, page: Tensor) -> None:
        halves = page.view(1, 1, 2 * page_tokens, -1).chunk(2, dim=2)
        slots = torch.arange(page_tokens)
        ops.cpu_attn_reshape_and_cache(keys, values, *halves, slots, layer.isa)  # type: ignore[attr-defined]

    return PageFormat.probe(write, page_tokens, content // 2, cache.dtype)
