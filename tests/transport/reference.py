"""The codec's bytes a second time: slow, in plain NumPy and Python integers, from docs/cachegen.md.

It shares only the codebook's numbers with the package.
"""

import struct

import numpy as np

from vllm_kvcompress.transport.codec import codebook

REACH, CENTRE, SCALE, LOW = 15, 16, 4096, 1 << 16
SPREADS, OFFSETS, SHAPES, OWN = 24, 5, 2, 255
FIXED, PER_TOKEN, LOSSLESS = range(3)
MANTISSA = {"bfloat16": 7, "float16": 10, "float32": 7}


class OutOfRange(Exception):
    """A value that a lossy quantiser cannot hold."""


def floats(bits: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "float32":
        return bits.astype(np.float32)
    if dtype == "float16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def lanes_for(symbols: int) -> int:
    return 64 if symbols >= 1 << 17 else 32 if symbols >= 1 << 16 else 16


def mean_square(x: np.ndarray) -> float:
    """Eight interleaved sums, so that any vector width adds in the same order."""
    flat = x.astype(np.float64).ravel()
    flat = np.pad(flat**2, (0, -len(flat) % 8)).reshape(-1, 8)
    s = np.cumsum(flat, axis=0)[-1]
    return (((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]))) / x.size


def quantise(x: np.ndarray, inverse: np.ndarray, even: int = 0) -> np.ndarray:
    """Ties are broken so that the result + `even` is even."""
    with np.errstate(over="ignore", invalid="ignore"):
        y = x * inverse[:, None]
    if not (np.abs(y) <= 8191).all():
        raise OutOfRange
    return np.rint(y.astype(np.float64) + even).astype(np.int64) - even


def costs_of(freq: np.ndarray) -> np.ndarray:
    cost = np.zeros(32, np.int64)
    for s in range(32):
        escape = s == 0 or freq[s] == 0
        f = int(freq[0] if escape else freq[s])
        cost[s] = int(np.floor(256 * (12 - np.log2(f)) + 0.5)) + (16 * 256 if escape else 0)
    return cost


def entropy(counts: np.ndarray, tokens: int) -> int:
    def log(n: int) -> int:
        return int(np.floor(65536 * np.log2(n) + 0.5))

    return (tokens * log(tokens) - sum(int(c) * log(int(c)) for c in counts if c)) >> 8


def normalise(counts: np.ndarray, tokens: int) -> np.ndarray:
    freq = np.array([int(c) * SCALE // tokens for c in counts])
    for s in range(32):
        if freq[s] == 0 and (counts[s] or s == 0):
            freq[s] = 1
    freq[int(np.argmax(counts))] += SCALE - freq.sum()
    if freq.max() == SCALE:
        freq[int(freq.argmax())] -= 1
        freq[CENTRE] += 1
    return freq


def residuals(q: np.ndarray, centre: int, delta: bool) -> np.ndarray:
    return np.diff(q, prepend=centre) if delta else q - centre


def symbols_of(v: np.ndarray, shift: int) -> tuple[np.ndarray, np.ndarray]:
    biased = v + ((1 << shift) >> 1)
    w = biased >> shift
    return np.where(np.abs(w) <= REACH, w + CENTRE, 0), biased


def adapt(q: np.ndarray, lossless: bool) -> dict:
    """The channel's own choice: centre, delta, shift, and the best of six codebook tables."""
    tokens = len(q)
    centre = (2 * int(q.sum()) + tokens) // (2 * tokens)
    magnitude, steps = int(np.abs(q - centre).sum()), int(np.abs(np.diff(q)).sum())
    delta = not lossless and 8 * steps < 7 * magnitude
    v, shift = residuals(q, centre, delta), 0
    while not lossless and shift < 10:
        if int((symbols_of(v, shift)[0] == 0).sum()) * 256 <= tokens:
            break
        shift += 1
    symbols, biased = symbols_of(v, shift)
    counts = np.bincount(symbols, minlength=32)
    book = codebook()
    offset = OFFSETS // 2
    if not delta and not shift:
        excess = int(q.sum()) - centre * tokens
        offset = (2 * OFFSETS * excess + OFFSETS * tokens) // (2 * tokens)
    spreads = book["spreads"][int(lossless), offset].astype(int)
    deviation = (steps if delta else magnitude) * 256
    spread = 0
    while spread < SPREADS - 1 and deviation > (int(spreads[spread]) * tokens) << shift:
        spread += 1
    best = None
    for shape in range(SHAPES):
        for column in range(max(0, spread - 1), min(SPREADS - 1, spread + 1) + 1):
            table = 1 + (shape * OFFSETS + offset) * SPREADS + column
            freq = book["frequencies"][int(lossless), table].astype(int)
            cost = int(counts @ costs_of(freq))
            if best is None or cost < best[0]:
                best = cost, table, freq
    cost, table, freq = best
    own_cost = (4 + 2 * int((counts > 0).sum())) * 8 * 256
    if cost - entropy(counts, tokens) > own_cost:
        own = normalise(counts, tokens)
        if int(counts @ costs_of(own)) + own_cost < cost:
            cost, table, freq = int(counts @ costs_of(own)) + own_cost, OWN, own
    return {
        "table": table,
        "freq": freq,
        "shift": shift,
        "delta": delta,
        "centre": centre - ((1 << shift) >> 1),
        "symbols": symbols,
        "biased": biased,
        "cost": cost + shift * tokens * 256,
    }


def follow(q: np.ndarray, freq: np.ndarray, record: np.ndarray) -> dict:
    """The profile's choice."""
    shift, delta = int(record[1]) & 15, bool(record[1] & 128)
    centre = int(record[2:].copy().view("<i2")[0])
    symbols, biased = symbols_of(residuals(q, centre + ((1 << shift) >> 1), delta), shift)
    cost = int(np.bincount(symbols, minlength=32) @ costs_of(freq)) + shift * len(q) * 256
    return {
        "table": 0,
        "freq": freq.astype(int),
        "shift": shift,
        "delta": delta,
        "centre": centre,
        "symbols": symbols,
        "biased": biased,
        "cost": cost,
    }


def pack_bits(values: np.ndarray, width: int) -> bytes:
    number = 0
    for i, value in enumerate(values):
        number |= int(value) << (i * width)
    return number.to_bytes((len(values) * width + 7) // 8, "little")


def rans(channels: list[dict], lanes: int) -> tuple[list[int], list[int]]:
    """Final states and words; the coder runs from the last symbol to the first."""
    states, words = [LOW] * lanes, []
    for channel in reversed(channels):
        freq = channel["freq"]
        start = np.concatenate(([0], np.cumsum(freq)))
        for t in reversed(range(len(channel["symbols"]))):
            s, lane = int(channel["symbols"][t]), t % lanes
            f, x = int(freq[s]), states[lane]
            if x >= f << 20:
                words.append(x & 0xFFFF)
                x >>= 16
            states[lane] = ((x // f) << 12) + x % f + int(start[s])
    return states, words[::-1]


def encode_section(
    bits: np.ndarray,
    dtype: str,
    quantiser: int,
    parameter: float,
    profile: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[np.ndarray, bytes]:
    """Records `[channels, 4]` and the section's bytes for `[tokens, channels]`."""
    try:
        return _encode(bits, dtype, quantiser, parameter, profile)
    except OutOfRange:
        return _encode(bits, dtype, LOSSLESS, 0, None)


def _encode(bits, dtype, quantiser, parameter, profile):
    tokens, width = bits.shape
    x, one = floats(bits, dtype), np.float32(1)
    step, half, scales = np.float32(0), 0, b""
    raw: list[bytes] = []
    if quantiser == FIXED:
        step = np.float32(np.float64(np.float32(parameter)) * np.sqrt(mean_square(x)))
        step = step if step > 0 else one
        q = quantise(x, np.full(tokens, one / step))
    elif quantiser == PER_TOKEN:
        half = int(parameter)
        most = np.abs(x).max(axis=1)
        if not np.isfinite(most).all():
            raise OutOfRange
        inverse = np.divide(np.float32(half), most, out=np.zeros_like(most), where=most != 0)
        q = quantise(x, inverse, half)
        at = np.abs(x).argmax(axis=1)
        sign = {"float32": 0x7FFFFFFF}.get(dtype, 0x7FFF)
        view = bits.view(np.uint32) if dtype == "float32" else bits
        scales = (view[np.arange(tokens), at] & sign).astype(view.dtype).tobytes()
    else:
        upper = bits.view(np.uint32) >> 16 if dtype == "float32" else bits
        m = MANTISSA[dtype]
        q = (upper.astype(np.int64) >> m) & ((1 << (15 - m)) - 1)
        mantissa = ((upper >> 15) << m) | (upper & ((1 << m) - 1))

    chosen = []
    for c in range(width):
        choice = adapt(q[:, c], quantiser == LOSSLESS)
        if profile is not None:
            offline = follow(q[:, c], profile[0][c], profile[1][c])
            if offline["cost"] <= choice["cost"] + 16 * 256:
                choice = offline
        unseen = choice["freq"][choice["symbols"]] == 0
        choice["symbols"] = np.where(unseen, 0, choice["symbols"])
        chosen.append(choice)
        if quantiser == LOSSLESS:
            raw.append(pack_bits(mantissa[:, c], MANTISSA[dtype] + 1))
            if dtype == "float32":
                raw.append(pack_bits(bits[:, c].copy().view(np.uint32) & 0xFFFF, 16))
        elif choice["shift"]:
            raw.append(pack_bits(choice["biased"] & ((1 << choice["shift"]) - 1), choice["shift"]))

    lanes = lanes_for(tokens * width)
    states, words = rans(chosen, lanes)
    escapes = [
        int(b) for k in chosen for b, s in zip(k["biased"], k["symbols"], strict=True) if not s
    ]
    own = b""
    for k in chosen:
        if k["table"] == OWN:
            present = [s for s in range(32) if k["freq"][s]]
            own += struct.pack("<I", sum(1 << s for s in present))
            own += struct.pack(f"<{len(present)}H", *(int(k["freq"][s]) for s in present))
    own_tables = sum(k["table"] == OWN for k in chosen)
    raw_part = b"".join(raw)
    header = struct.pack(
        "<IIIHBBfHH",
        *(len(words), len(raw_part), len(escapes), own_tables, lanes, quantiser),
        *(step, half, 0),
    )
    body = b"".join(
        [
            header,
            struct.pack(f"<{lanes}I", *states),
            struct.pack(f"<{len(words)}H", *words),
            struct.pack(f"<{len(escapes)}h", *escapes),
            raw_part,
            own,
            scales,
        ]
    )
    records = np.array(
        [
            [
                k["table"],
                k["shift"] | (128 if k["delta"] else 0),
                k["centre"] & 0xFF,
                k["centre"] >> 8 & 0xFF,
            ]
            for k in chosen
        ],
        np.uint8,
    )
    return records, body + b"\0" * (-len(body) % 8)
