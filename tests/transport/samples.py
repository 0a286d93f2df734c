"""KV arrays for codec tests: `[sections, tokens, channels]`, as bits of a cache dtype."""

import numpy as np

from vllm_kvcompress.transport.codec import CodecMissing, as_bits, instruction_sets

try:
    INSTRUCTION_SETS = instruction_sets()
except CodecMissing:
    INSTRUCTION_SETS = []  # conftest.py skips what needs them, with the reason


def gaussian(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Channels of different width and mean, some with outliers, some constant."""
    sections, _, channels = shape
    x = rng.normal(size=shape) * np.exp(rng.normal(size=(sections, 1, channels)))
    x += rng.normal(size=(sections, 1, channels)) * (rng.random((sections, 1, channels)) < 0.3)
    x *= 1 + 40 * (rng.random(shape) < 0.002)
    x[..., -1] = 0.25
    return x


def drifting(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Neighbouring tokens alike, as in keys of slow rotary channels."""
    sections, _tokens, channels = shape
    steps = rng.normal(size=shape) * 0.1
    return steps.cumsum(axis=1) + rng.normal(size=(sections, 1, channels))


def extremes(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return np.where(rng.random(shape) < 0.5, -3.0, 3.0)


def two_peaks(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Far from every codebook shape: a table of one's own pays."""
    return rng.choice([-2.0, 0.0, 0.1, 2.0], size=shape, p=[0.4, 0.1, 0.1, 0.4])


def zeros(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return np.zeros(shape)


def bits(make, dtype: str, *shape: int, seed: int = 0) -> np.ndarray:
    return as_bits(make(np.random.default_rng(seed), *shape), dtype)


def damaged(
    rng: np.random.Generator, section: bytes, records: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A section and its records with up to three bytes changed, or cut short."""
    data, records = np.frombuffer(section, np.uint8).copy(), records.copy()
    target = records.reshape(-1) if rng.random() < 0.3 else data
    at = rng.integers(0, min(len(target), 64 if rng.random() < 0.5 else 1 << 30), size=3)
    target[at] = rng.integers(0, 256, size=3)
    if rng.random() < 0.2:
        data = data[: rng.integers(0, len(data))]
    return data, records


ALL = (gaussian, drifting, extremes, two_peaks, zeros)
