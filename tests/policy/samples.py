"""Observations and scores to try policies on."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from vllm_kvcompress.policy import Observation


def observation(
    n: int = 96, heads: int = 2, group: int = 2, window: int = 8, size: int = 8, seed: int = 0
) -> Observation:
    """Random tensors; the window is the last queries of the prompt."""
    draw = torch.Generator().manual_seed(seed)
    return Observation(
        queries=torch.randn(window, heads, group, size, generator=draw) * 3,
        query_positions=torch.arange(n - window, n),
        keys=torch.randn(heads, n, size, generator=draw),
        values=torch.randn(heads, n, size, generator=draw),
        positions=torch.arange(n),
        valid=None,
        scale=size**-0.5,
    )


@st.composite
def whole_scores(draw: st.DrawFn, pages: int = 4, tokens: int = 3) -> tuple[Tensor, int]:
    """Scores `[L, H, n]` and B; small whole numbers, so sums are exact and ties frequent."""
    layers, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    page_tokens = draw(st.integers(1, tokens))
    n = draw(st.integers(1, pages)) * page_tokens
    count = layers * heads * n
    flat = draw(st.lists(st.integers(-4, 9), min_size=count, max_size=count))
    return torch.tensor(flat, dtype=torch.float32).view(layers, heads, n), page_tokens
