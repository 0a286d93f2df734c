"""Levels count upwards in quality: 0 is the text (recompute), 1-3 are lossy, 4 loses nothing.

Lossy levels come in two quantisers. `fixed` rounds to one step per (layer, K or V), a multiple of
the root mean square. `published` is CacheGen's: per token, the largest magnitude is divided into
a number of bins that depends on the layer (arXiv 2310.07240; schedules of the released code).
"""

from enum import StrEnum
from typing import NamedTuple

import numpy as np

RECOMPUTE, LOSSLESS = 0, 4
LEVELS = range(RECOMPUTE, LOSSLESS + 1)
LOSSY = range(1, LOSSLESS)
DEFAULT_LEVEL = 2
FIXED_STEP, PER_TOKEN, EXACT = range(3)  # as the codec numbers them


class Quantiser(StrEnum):
    FIXED = "fixed"
    PUBLISHED = "published"


class Step(NamedTuple):
    """Steps as multiples of the section's root mean square."""

    k: float
    v: float


STEPS = {1: Step(0.8, 1.0), 2: Step(0.5, 0.6), 3: Step(0.3, 0.4)}

# Bins of the released code's three levels: (first layer beyond, bins) for K and for V.
PUBLISHED_BINS = {
    1: (((10, 16), (20, 16), (None, 12)), ((2, 16), (None, 12))),
    2: (((10, 32), (20, 16), (None, 16)), ((2, 32), (None, 16))),
    3: (((10, 32), (20, 32), (None, 32)), ((2, 32), (None, 32))),
}


def published_bins(level: int, layer: int) -> tuple[int, int]:
    """Bins of K and of V in one layer."""
    k, v = (
        next(bins for before, bins in part if before is None or layer < before)
        for part in PUBLISHED_BINS[level]
    )
    return k, v


class Plan(NamedTuple):
    """What the codec is asked for, per section (K and V of each layer in turn)."""

    quantisers: np.ndarray  # uint8 [2 * layers]
    parameters: np.ndarray  # float32 [2 * layers]


def plan(level: int, layers: int, quantiser: Quantiser = Quantiser.FIXED) -> Plan:
    """Raises ValueError for a level that is not 1-4."""
    if level == LOSSLESS:
        return Plan(np.full(2 * layers, EXACT, np.uint8), np.zeros(2 * layers, np.float32))
    if level not in LOSSY:
        raise ValueError(f"level {level}: a stored level is 1, 2, 3 (lossy) or 4 (lossless)")
    if quantiser is Quantiser.FIXED:
        parameters = np.tile(np.array(STEPS[level], np.float32), layers)
        return Plan(np.full(2 * layers, FIXED_STEP, np.uint8), parameters)
    bins = np.array([published_bins(level, layer) for layer in range(layers)])
    return Plan(
        np.full(2 * layers, PER_TOKEN, np.uint8), (bins.ravel() // 2 - 1).astype(np.float32)
    )
