"""Offline statistics of a model's KV cache: one table per (layer, K or V, channel) and level.

Chunks coded with a profile carry no tables; they name the profile by its digest, and decoding
needs the same file. It is a safetensors file: frequencies, channel records and steps per level.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash
from safetensors import SafetensorError
from safetensors.numpy import load, save

from vllm_kvcompress.transport.codec import Tables, as_floats
from vllm_kvcompress.transport.levels import FIXED_STEP, LOSSLESS, LOSSY, Quantiser, plan

SYMBOLS, CENTRE, REACH, SCALE, MAX_SHIFT = 32, 16, 15, 4096, 10
DELTA = 128
MAX_PROFILE_BYTES = 1 << 30
PRIOR = np.array([1, 4, 1]) / 300  # what each count says of its neighbours, seen or not


class LevelProfile(NamedTuple):
    tables: Tables
    steps: np.ndarray | None  # float32 [sections]; None where the quantiser has no fixed step


@dataclass(frozen=True)
class Profile:
    """Tables of every level that was profiled, for one shape and dtype of cache."""

    levels: Mapping[int, LevelProfile]
    dtype: str
    quantiser: Quantiser
    digest: str

    def at(
        self, level: int, quantiser: Quantiser, shape: tuple[int, ...], dtype: str
    ) -> LevelProfile | None:
        """The tables for `[layers, 2, tokens, channels]` arrays, or None if they do not fit."""
        found = self.levels.get(level)
        if found is None or dtype != self.dtype or quantiser != self.quantiser:
            return None
        layers, _, _, channels = shape
        return found if found.tables.channels.shape[:2] == (2 * layers, channels) else None

    def to_bytes(self) -> bytes:
        tensors = {}
        for level, (tables, steps) in self.levels.items():
            tensors[f"{level}.frequencies"] = tables.frequencies
            tensors[f"{level}.channels"] = tables.channels
            if steps is not None:
                tensors[f"{level}.steps"] = steps
        tensors["dtype"] = np.frombuffer(self.dtype.encode(), np.uint8)
        tensors["quantiser"] = np.frombuffer(self.quantiser.encode(), np.uint8)
        return save(tensors)

    @classmethod
    def from_bytes(cls, data: bytes) -> "Profile":
        """Raises ValueError for what is no profile."""
        try:
            tensors = load(data)
            dtype = tensors.pop("dtype").tobytes().decode()
            quantiser = Quantiser(tensors.pop("quantiser").tobytes().decode())
            names = sorted({int(name.split(".")[0]) for name in tensors})
            levels = {
                level: LevelProfile(
                    Tables(tensors[f"{level}.frequencies"], tensors[f"{level}.channels"]),
                    tensors.get(f"{level}.steps"),
                )
                for level in names
            }
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"not a profile: {error}") from None
        for level, (tables, steps) in levels.items():
            _check(level, tables, steps)
        return cls(levels, dtype, quantiser, xxhash.xxh3_128_hexdigest(data))

    @classmethod
    def load(cls, path: Path) -> "Profile":
        """Raises ValueError for what is no profile, OSError for what cannot be read."""
        if path.stat().st_size > MAX_PROFILE_BYTES:
            raise ValueError(f"{path}: larger than {MAX_PROFILE_BYTES} bytes")
        return cls.from_bytes(path.read_bytes())


def _check(level: int, tables: Tables, steps: np.ndarray | None) -> None:
    freq, channels = tables
    fits = (
        freq.dtype == np.uint16
        and channels.dtype == np.uint8
        and freq.ndim == channels.ndim == 3
        and freq.shape[2] == SYMBOLS
        and channels.shape == (*freq.shape[:2], 4)
        and (steps is None or (steps.dtype == np.float32 and steps.shape == freq.shape[:1]))
    )
    if not fits or level not in (*LOSSY, LOSSLESS):
        raise ValueError("not a profile: its arrays do not fit together")
    sums = freq.astype(np.int64).sum(axis=2)
    if (sums != SCALE).any() or (freq[..., 0] == 0).any() or (freq == SCALE).any():
        raise ValueError("not a profile: a table does not add up")
    if steps is not None and not (np.isfinite(steps).all() and (steps > 0).all()):
        raise ValueError("not a profile: a step is not positive")


def build(kv: np.ndarray, dtype: str, quantiser: Quantiser = Quantiser.FIXED) -> Profile:
    """Statistics of `[layers, 2, tokens, channels]` (bits, see codec.py): the more tokens the
    better; a few thousand serve."""
    layers, _, tokens, channels = kv.shape
    values = kv.reshape(2 * layers, tokens, channels)
    levels = {level: _level(values, dtype, level, quantiser) for level in (*LOSSY, LOSSLESS)}
    return Profile.from_bytes(Profile(levels, dtype, quantiser, "").to_bytes())


def _level(values: np.ndarray, dtype: str, level: int, quantiser: Quantiser) -> LevelProfile:
    wanted = plan(level, len(values) // 2, quantiser)
    tables, steps = [], []
    for bits, kind, parameter in zip(values, *wanted, strict=True):
        if level == LOSSLESS:
            q = exponents(bits, dtype)
        else:
            x = as_floats(bits, dtype).astype(np.float64)
            if kind == FIXED_STEP:
                step = float(np.sqrt((x**2).mean())) * float(parameter) or 1.0
                steps.append(step)
            else:
                most = np.abs(x).max(axis=1, keepdims=True)
                step = np.where(most > 0, most, 1) / float(parameter)
            q = np.rint(x / step).astype(np.int64)
        tables.append(_section_tables(q, lossless=level == LOSSLESS))
    frequencies, channels = (np.stack(part) for part in zip(*tables, strict=True))
    return LevelProfile(
        Tables(frequencies, channels), np.array(steps, np.float32) if steps else None
    )


def exponents(bits: np.ndarray, dtype: str) -> np.ndarray:
    """The biased exponents, which the lossless level codes."""
    if dtype == "float32":
        return (bits.view(np.uint32) >> 23 & 0xFF).astype(np.int64)
    mantissa, mask = (10, 31) if dtype == "float16" else (7, 0xFF)
    return (bits >> mantissa & mask).astype(np.int64)


def _section_tables(q: np.ndarray, *, lossless: bool) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies `[channels, 32]` and records `[channels, 4]` of integers `[tokens, channels]`."""
    tokens, channels = q.shape
    centre = np.floor(q.mean(axis=0) + 0.5).astype(np.int64)
    around = q - centre
    steps = np.diff(q, axis=0, prepend=centre[None])
    delta = 8 * np.abs(steps[1:]).sum(axis=0) < 7 * np.abs(around).sum(axis=0)
    delta &= not lossless
    v = np.where(delta, steps, around)
    shift = np.zeros(channels, np.int64)
    while not lossless:
        w = (v + ((1 << shift) >> 1)) >> shift
        wide = ((np.abs(w) > REACH).sum(axis=0) * 256 > tokens) & (shift < MAX_SHIFT)
        if not wide.any():
            break
        shift += wide
    half = (1 << shift) >> 1
    w = (v + half) >> shift
    symbols = np.where(np.abs(w) <= REACH, w + CENTRE, 0)
    flat = (np.arange(channels) * SYMBOLS + symbols).ravel()
    counts = np.bincount(flat, minlength=channels * SYMBOLS).reshape(channels, SYMBOLS)
    records = np.zeros((channels, 4), np.uint8)
    records[:, 1] = shift | np.where(delta, DELTA, 0)
    stored = np.clip(centre - half, -32768, 32767).astype("<i2")
    records[:, 2:] = stored.view(np.uint8).reshape(channels, 2)
    return smoothed(counts), records


def smoothed(counts: np.ndarray) -> np.ndarray:
    """Frequencies that add up to 4096, where what was near something seen has some too."""
    seen = counts.astype(np.float64)
    inner = np.pad(seen[:, 1:], ((0, 0), (1, 1)))
    spread = inner[:, :-2] * PRIOR[0] + inner[:, 1:-1] * PRIOR[1] + inner[:, 2:] * PRIOR[2]
    seen[:, 1:] += spread + 0.02
    seen[:, 0] += 0.05
    freq = np.rint(seen / seen.sum(axis=1, keepdims=True) * SCALE).astype(np.int64)
    freq[:, 0] = np.maximum(freq[:, 0], 1)
    rows = np.arange(len(freq))
    largest = freq.argmax(axis=1)
    freq[rows, largest] += SCALE - freq.sum(axis=1)
    alone = freq[rows, largest] == SCALE
    freq[rows[alone], largest[alone]] -= 1
    freq[rows[alone], 0] += 1
    return freq.astype(np.uint16)
