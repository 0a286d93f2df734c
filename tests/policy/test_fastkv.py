"""FastKV's retention (arXiv 2502.01068) against worked numbers."""

import numpy as np
import pytest
import torch

from vllm_kvcompress.config import shipped_presets
from vllm_kvcompress.policy import Observation, build


def seeded(n: int = 32, window: int = 4) -> Observation:
    """Queries, then keys, of `default_rng(0)`: 4 query heads on 2 KV heads."""
    rng = np.random.default_rng(0)
    queries = torch.from_numpy(rng.standard_normal((4, n, 8)))
    keys = torch.from_numpy(rng.standard_normal((2, n, 8)))
    return Observation(
        queries=queries[:, -window:].transpose(0, 1).unflatten(1, (2, 2)),
        query_positions=torch.arange(n - window, n),
        keys=keys,
        values=keys,
        positions=torch.arange(n),
        valid=None,
        scale=8**-0.5,
    )


@pytest.mark.parametrize(
    ("pool", "kept_of_heads"),
    [("max", [[3, 4, 5, 21], [6, 7, 8, 9]]), ("avg", [[3, 15, 16, 21], None])],
)
def test_worked_example_of_retention(pool, kept_of_heads) -> None:
    preset = shipped_presets()["fastkv"]
    scorer = preset.scorer.model_copy(update={"pool": pool})
    policy = build(preset.model_copy(update={"scorer": scorer}))
    scores = policy.scorer.score(seeded(), 0)
    kept = policy.keep(scores[None], 2 * 8, 1, 0, 4)
    for head, expected in enumerate(kept_of_heads):
        got = kept.indices[kept.indices // 32 == head] % 32
        if expected is not None:
            assert got.tolist() == [*expected, 28, 29, 30, 31]
