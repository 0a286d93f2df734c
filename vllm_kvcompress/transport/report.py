"""How large a KV cache is at each level, beside other ways to write it down."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import zstandard

from vllm_kvcompress.transport.chunks import ChunkCodec
from vllm_kvcompress.transport.codec import ITEM_BYTES, as_floats
from vllm_kvcompress.transport.container import parse
from vllm_kvcompress.transport.levels import FIXED_STEP, LEVELS, LOSSLESS, plan
from vllm_kvcompress.transport.sample import Sample


@dataclass(frozen=True)
class LevelSize:
    """Bits per KV element at one level; the first is everything as stored."""

    level: int
    stored: float
    by_layer: np.ndarray  # [layers, 2], of the sections alone
    zstd: float  # the same integers, a byte or two each, through zstd -3; lossless: the raw bytes
    entropy: float  # order 0 of the same integers, per channel over the whole text
    error: float  # root mean square, relative to the values'
    profile_share: float  # of the channels, coded with the profile's tables

    def to_dict(self) -> dict[str, object]:
        return {**vars(self), "by_layer": self.by_layer.round(4).tolist()}


def level_sizes(sample: Sample, codec: ChunkCodec, chunk_tokens: int) -> list[LevelSize]:
    """Encode and decode the whole text at every level, in chunks."""
    return [_level_size(sample, codec, chunk_tokens, level) for level in LEVELS[1:]]


def raw_bits(sample: Sample) -> int:
    return 8 * ITEM_BYTES[sample.dtype]


def eight_bit(sample: Sample) -> float:
    """A byte per element and a 16-bit scale per token, layer and K or V."""
    return 8 + 16 / sample.kv.shape[3]


def _level_size(sample: Sample, codec: ChunkCodec, chunk_tokens: int, level: int) -> LevelSize:
    kv, _, dtype = sample
    layers, _, tokens, _ = kv.shape
    stored, by_layer, zstd_bytes, profiled, square = 0, np.zeros((layers, 2)), 0, [], 0.0
    for start in range(0, tokens, chunk_tokens):
        part = np.ascontiguousarray(kv[:, :, start : start + chunk_tokens])
        data = codec.encode(part, dtype, level, heads=sample.heads)
        container = parse(data)
        stored += len(data)
        by_layer += container.section_bytes()
        profiled.append((container.records()[..., 0] == 0).mean())
        back = as_floats(codec.decode(data), dtype).astype(np.float64)
        square += float(((back - as_floats(part, dtype)) ** 2).sum())
        zstd_bytes += len(zstandard.compress(_integers(part, dtype, level).tobytes(), 3))
    whole = _integers(kv, dtype, level)
    power = float((as_floats(kv, dtype).astype(np.float64) ** 2).sum())
    return LevelSize(
        level=level,
        stored=8 * stored / kv.size,
        by_layer=8 * by_layer * 2 * layers / kv.size,
        zstd=8 * zstd_bytes / kv.size,
        entropy=_entropy(whole) if level != LOSSLESS else float("nan"),
        error=(square / power) ** 0.5 if power else 0.0,
        profile_share=float(np.mean(profiled)),
    )


def _integers(kv: np.ndarray, dtype: str, level: int) -> np.ndarray:
    """What the fixed step makes of the values, `[layers, 2, channels, tokens]`."""
    by_channel = np.ascontiguousarray(kv.swapaxes(2, 3))
    if level == LOSSLESS:
        return by_channel
    kinds, parameters = plan(level, len(kv))
    assert (kinds == FIXED_STEP).all()
    x = as_floats(by_channel, dtype).astype(np.float64)
    step = np.sqrt((x**2).mean(axis=(2, 3), keepdims=True)) * parameters.reshape(-1, 2, 1, 1)
    q = np.rint(x / np.where(step > 0, step, 1))
    return q.astype(np.int8 if np.abs(q).max() < 128 else np.int16)


def _entropy(q: np.ndarray) -> float:
    bits = 0.0
    for channel in q.reshape(-1, q.shape[-1]):
        counts = np.unique(channel, return_counts=True)[1] / channel.size
        bits -= float((counts * np.log2(counts)).sum())
    return bits / (q.size // q.shape[-1])


def plot(sizes: list[LevelSize], sample: Sample, path: Path) -> None:
    """Bits by level beside the other ways, and by layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (whole, layers) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    at, width = np.arange(len(sizes)), 0.28
    whole.bar(at - width, [s.stored for s in sizes], width, label="stored, all in")
    whole.bar(at, [s.zstd for s in sizes], width, label="zstd -3 of the same integers")
    whole.bar(at + width, [s.entropy for s in sizes], width, label="their entropy, per channel")
    whole.axhline(raw_bits(sample), color="black", lw=1, label=f"raw {sample.dtype}")
    whole.axhline(eight_bit(sample), color="black", lw=1, ls="--", label="8-bit, scale per token")
    whole.set_xticks(at, [f"level {s.level}" for s in sizes])
    whole.set_ylabel("bits per KV element")
    whole.legend(fontsize=8)
    for size in sizes:
        (line,) = layers.plot(size.by_layer[:, 0], "-o", ms=3, label=f"level {size.level}, K")
        layers.plot(size.by_layer[:, 1], "--o", ms=3, color=line.get_color(), label="V")
    layers.set_xlabel("layer")
    layers.set_ylabel("bits per KV element")
    layers.set_ylim(bottom=0)
    layers.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
