"""How large KV is in each writing, at equal error: everything included, bits per element."""

from dataclasses import dataclass

import numpy as np
import zstandard

from vllm_kvcompress.transport.chunks import ChunkCodec
from vllm_kvcompress.transport.codec import SectionCodec, as_bits, as_floats
from vllm_kvcompress.transport.container import Header, pack
from vllm_kvcompress.transport.levels import FIXED_STEP, PER_TOKEN, Plan

DTYPE = "bfloat16"
BF16_BITS = 16


@dataclass(frozen=True)
class Size:
    """One writing of one array, and how far off it is."""

    what: str
    bits: float
    errors: np.ndarray  # root mean square of each layer's K and V, [layers, 2]; 0: lossless

    def to_dict(self) -> dict[str, object]:
        return {"what": self.what, "bits": self.bits, "errors": self.errors.tolist()}


def rms(values: np.ndarray) -> np.ndarray:
    """Of `[layers, 2, tokens, channels]` floats: `[layers, 2]`."""
    return np.sqrt((values.astype(np.float64) ** 2).mean(axis=(2, 3)))


def errors_of(back: np.ndarray, kv: np.ndarray) -> np.ndarray:
    return rms(as_floats(back, DTYPE).astype(np.float64) - as_floats(kv, DTYPE))


def relative_error(back: np.ndarray, kv: np.ndarray) -> float:
    """Of the whole array, bf16 bits."""
    error, whole = errors_of(back, kv), rms(as_floats(kv, DTYPE))
    return float(np.sqrt((error**2).mean() / (whole**2).mean()))


def coded(
    kv: np.ndarray, heads: int, chunk_tokens: int, plan: Plan, *, relative: bool
) -> tuple[float, np.ndarray]:
    """(bits per element, what comes back) of containers by this plan, without a profile."""
    layers, _, tokens, channels = kv.shape
    codec, whole, size, back = SectionCodec(), ChunkCodec(), 0, []
    for start in range(0, tokens, chunk_tokens):
        part = np.ascontiguousarray(kv[:, :, start : start + chunk_tokens])
        header = Header(
            layers=layers,
            tokens=part.shape[2],
            heads=heads,
            head_size=channels // heads,
            dtype=DTYPE,
            level=1,
        )
        sections = part.reshape(2 * layers, -1, channels)
        data = pack(header, codec.encode(sections, DTYPE, plan, heads=heads, relative=relative))
        size += len(data)
        back.append(whole.decode(data))
    return 8 * size / kv.size, np.concatenate(back, axis=2)


def published(kv: np.ndarray, heads: int, chunk_tokens: int, bins: np.ndarray) -> Size:
    """The published quantiser in our container; `bins` is `[2, layers]`."""
    kinds = np.full(bins.size, PER_TOKEN, np.uint8)
    plan = Plan(kinds, (bins.T.ravel() // 2 - 1).astype(np.float32))
    bits, back = coded(kv, heads, chunk_tokens, plan, relative=False)
    return Size("its bins, our coder", bits, errors_of(back, kv))


def at_error(kv: np.ndarray, heads: int, chunk_tokens: int, errors: np.ndarray) -> Size:
    """Our fixed step, as wide as keeps every layer's K and V at most `[layers, 2]` rms off."""
    steps = errors * np.sqrt(12)
    kinds = np.full(steps.size, FIXED_STEP, np.uint8)
    for _ in range(8):
        parameters = np.repeat(steps.reshape(-1, 1), heads, axis=1).astype(np.float32)
        bits, back = coded(kv, heads, chunk_tokens, Plan(kinds, parameters), relative=False)
        ours = errors_of(back, kv)
        if (ours <= errors).all() and (ours >= 0.99 * errors).all():
            break
        steps = steps * (0.997 * errors / ours)
    return Size("ours", bits, ours)


def zstd_of_symbols(kv: np.ndarray, chunk_tokens: int, bins: np.ndarray) -> float:
    """Bits of zstd -3 on the published quantiser's symbols, by channel, and 16-bit scales."""
    x = as_floats(kv, DTYPE)
    most = np.abs(x).max(axis=3, keepdims=True)
    half = (bins.T // 2 - 1)[:, :, None, None]
    q = np.rint(x * half / np.where(most > 0, most, 1)).astype(np.int8)
    size = most.size * 2
    for start in range(0, kv.shape[2], chunk_tokens):
        by_channel = np.ascontiguousarray(q[:, :, start : start + chunk_tokens].swapaxes(2, 3))
        size += len(zstandard.compress(by_channel.tobytes(), 3))
    return 8 * size / kv.size


def eight_bit(kv: np.ndarray) -> Size:
    """127 steps each side of a token's largest magnitude, and a 16-bit scale."""
    x = as_floats(kv, DTYPE)
    most = np.abs(x).max(axis=3, keepdims=True)
    scale = np.where(most > 0, most, 1) / 127
    back = as_bits((np.rint(x / scale) * scale).astype(np.float32), DTYPE)
    return Size("8-bit, a scale per token", 8 + 16 / kv.shape[3], errors_of(back, kv))
