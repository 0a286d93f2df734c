"""Write the codebook that every stream may refer to: vllm_kvcompress/transport/codebook.safetensors

Two families of 240 probability tables over 32 symbols, 12 bits each: for quantised values (a
Gaussian and a Laplace shape, five places of the mean inside its bin, 24 spreads) and for the
exponents of floating-point values (the magnitudes of the same shapes, their scale itself spread).
The file is part of the format: changing a number changes what old streams mean, so a new codebook
is a new container version.
"""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

OUT = Path(__file__).resolve().parent.parent / "vllm_kvcompress/transport/codebook.safetensors"
SYMBOLS, REACH, SCALE = 32, 15, 4096
SPREADS, OFFSETS, SHAPES, TABLES = 24, 5, 2, 256
VALUE_SPREADS = np.geomspace(0.02, 8.0, SPREADS)  # mean |residual| of the integers, in bins
EXPONENT_SPREADS = np.geomspace(0.1, 4.0, SPREADS)  # mean deviation of log2 |x|, in octaves
MEANS = (np.arange(OFFSETS) - OFFSETS // 2) / OFFSETS
EDGES = np.arange(-64, 65) - 0.5
INTEGERS = np.arange(-64, 64)
Cdf = Callable[[np.ndarray], np.ndarray]


def gaussian(x: np.ndarray) -> np.ndarray:
    """Cumulative, with mean magnitude 1."""
    return 0.5 + 0.5 * np.vectorize(math.erf)(x / math.sqrt(math.pi))


def laplace(x: np.ndarray) -> np.ndarray:
    """Cumulative, with mean magnitude 1."""
    tail = 0.5 * np.exp(-np.abs(x))
    return np.where(x < 0, tail, 1 - tail)


def solve(rises: Callable[[float], float], target: float, low: float, high: float) -> float:
    """Where a rising function reaches the target, or the nearer end."""
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if rises(middle) < target else (low, middle)
    return (low + high) / 2


def rounded(cdf: Cdf, mean: float) -> np.ndarray:
    """Probabilities of INTEGERS, the place chosen so that their mean is as asked."""

    def bins(place: float) -> np.ndarray:
        return np.diff(cdf(EDGES - place))

    return bins(solve(lambda place: bins(place) @ INTEGERS, mean, -1.0, 1.0))


def value_bins(cdf: Cdf, mean: float, spread: float) -> np.ndarray:
    """Integers of this mean and mean magnitude (never below the mean's own)."""

    def bins(width: float) -> np.ndarray:
        return rounded(lambda x: cdf(x / width), mean)

    return bins(solve(lambda width: bins(width) @ np.abs(INTEGERS), spread, 1e-2, 30.0))


def exponent_bins(cdf: Cdf, mean: float, spread: float) -> np.ndarray:
    """Exponents of values whose scale itself varies by a Gaussian number of octaves."""
    e = np.linspace(-40, 40, 8001)
    step = e[1] - e[0]
    density = np.gradient(2 * cdf(2.0**e) - 1, e)
    density /= density.sum()
    narrow = np.abs(e - density @ e) @ density
    to_sigma = math.sqrt(math.pi / 2)
    if spread > narrow:
        sigma = math.sqrt(spread**2 - narrow**2) * to_sigma
        density = np.convolve(density, np.exp(-0.5 * (e / sigma) ** 2), "same")
    else:  # of nearly one magnitude: not a value around zero, so a plain bell
        density = np.exp(-0.5 * (e / (spread * to_sigma)) ** 2)
    density /= density.sum()
    e = e - density @ e
    cumulative = np.cumsum(density)
    return rounded(lambda x: np.interp(x, e + step / 2, cumulative), mean)


def frequencies(bins: np.ndarray) -> np.ndarray:
    """Integers that add up to SCALE, an escape first; what is rarer than half a count escapes."""
    inside = bins[64 - REACH : 64 + REACH + 1]
    wanted = np.concatenate(([max(1 - inside.sum(), 1 / SCALE)], inside))
    freq = np.rint(wanted / wanted.sum() * SCALE).astype(int)
    freq[0] = max(freq[0], 1)
    freq[freq.argmax()] += SCALE - freq.sum()
    return freq


def main() -> None:
    tables = np.zeros((2, TABLES, SYMBOLS), np.uint16)
    spreads = np.zeros((2, OFFSETS, SPREADS), np.uint16)
    families = ((value_bins, VALUE_SPREADS), (exponent_bins, EXPONENT_SPREADS))
    for kind, (bins_of, columns) in enumerate(families):
        for shape, cdf in enumerate((gaussian, laplace)):
            for offset, mean in enumerate(MEANS):
                for column, spread in enumerate(columns):
                    bins = bins_of(cdf, mean, spread)
                    index = 1 + (shape * OFFSETS + offset) * SPREADS + column
                    tables[kind, index] = frequencies(bins)
                    if shape == 0:
                        spreads[kind, offset, column] = round(bins @ np.abs(INTEGERS) * 256)
    spreads = np.maximum.accumulate(spreads, axis=-1)
    save_file({"frequencies": tables, "spreads": spreads}, OUT)
    print(f"{OUT.name}: {2 * SHAPES * OFFSETS * SPREADS} tables")


if __name__ == "__main__":
    main()
