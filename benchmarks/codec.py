"""How fast and how small the KV codec is, beside zstd and LMCache's CacheGen codec for CPUs."""

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Annotated, NamedTuple

import numpy as np
import typer
import zstandard
from rich.progress import track

from vllm_kvcompress.bench import charts, codec_sizes
from vllm_kvcompress.bench.codec_sizes import DTYPE, Size
from vllm_kvcompress.bench.engine import MODEL
from vllm_kvcompress.bench.harness import Summary, Verdict, paired_ratio, write_report
from vllm_kvcompress.bench.lmcache_process import Lmcache, LmcacheFailed, default_bins
from vllm_kvcompress.bench.options import existing_model
from vllm_kvcompress.bench.table import Table
from vllm_kvcompress.bench.terminal import show_results, terminal
from vllm_kvcompress.transport.chunks import ChunkCodec
from vllm_kvcompress.transport.codec import as_bits, instruction_sets
from vllm_kvcompress.transport.levels import DEFAULT_LEVEL, LEVELS
from vllm_kvcompress.transport.sample import CannotSample, sample

HEAD_SIZE = 128
MOST_VALUES = 1 << 28  # of the synthetic input's K; with V, and as float32, 2 GiB
TIMES_LMCACHE, SHARE_OF_LMCACHE = 30, 0.65
TIMES_SMALLER = {32: 4.2, 16: 6.0}  # under bf16, at the published quantiser's error
LMCACHE = "LMCache, its default"


class Input(NamedTuple):
    name: str
    kv: np.ndarray  # bf16 bits [layers, 2, tokens, channels]
    heads: int


class Turn(NamedTuple):
    """One round of one codec on one input."""

    encode_s: float
    decode_s: float
    bytes: int
    back: np.ndarray


@dataclass
class Measured:
    """A codec on one input. Speeds are of the raw bf16 bytes, per second, round by round."""

    what: str
    threads: int
    bits: float = 0  # per element, all included
    rms_error: float = 0
    encode_mb_s: list[float] = field(default_factory=list)
    decode_mb_s: list[float] = field(default_factory=list)

    def add(self, kv: np.ndarray, turn: Turn) -> None:
        self.encode_mb_s.append(kv.nbytes / turn.encode_s / 1e6)
        self.decode_mb_s.append(kv.nbytes / turn.decode_s / 1e6)
        self.bits = 8 * turn.bytes / kv.size
        self.rms_error = codec_sizes.relative_error(turn.back, kv)


def synthetic(layers: int, tokens: int, channels: int, seed: int = 0) -> np.ndarray:
    """8B-like KV, bf16 bits `[layers, 2, tokens, channels]`: neighbours alike (AR(1)), channels of
    different width, a few outlier channels in K."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(layers, 2, tokens, channels)).astype(np.float32)
    rho = np.float32(0.6)
    for t in range(1, tokens):
        noise[:, :, t] = rho * noise[:, :, t - 1] + np.sqrt(1 - rho**2) * noise[:, :, t]
    noise *= np.exp(0.5 * rng.normal(size=(layers, 2, 1, channels))).astype(np.float32)
    outliers = rng.random((layers, 1, channels)) < 0.02
    noise[:, 0] = np.where(outliers, 8 * noise[:, 0] + 20, noise[:, 0])
    return as_bits(noise, DTYPE)


def timed(encode: Callable[[], list[bytes]], decode: Callable[[bytes], np.ndarray]) -> Turn:
    """One round: all chunks there, all chunks back, joined over tokens."""
    begun = perf_counter()
    data = encode()
    encoded = perf_counter()
    back = [decode(part) for part in data]
    ended = perf_counter()
    size = sum(len(part) for part in data)
    return Turn(encoded - begun, ended - encoded, size, np.concatenate(back, axis=2))


def ours(given: Input, chunk_tokens: int, level: int, isa: str, threads: int) -> Callable[[], Turn]:
    """Whole path: KV array to container and back, checksums and all."""
    codec = ChunkCodec(isa=isa, threads=threads)
    starts = range(0, given.kv.shape[2], chunk_tokens)
    parts = [np.ascontiguousarray(given.kv[:, :, s : s + chunk_tokens]) for s in starts]
    return lambda: timed(
        lambda: [codec.encode(part, DTYPE, level, heads=given.heads) for part in parts],
        codec.decode,
    )


def zstd_of_bytes(given: Input) -> Callable[[], Turn]:
    """zstd -3 of the raw cache, high and low bytes apart, channel by channel: lossless."""
    kv = given.kv

    def encode() -> list[bytes]:
        by_channel = np.ascontiguousarray(kv.swapaxes(2, 3)).view(np.uint8)
        planes = np.ascontiguousarray(by_channel.reshape(-1, 2).T)
        return [zstandard.compress(planes.tobytes(), 3)]

    def decode(data: bytes) -> np.ndarray:
        planes = np.frombuffer(zstandard.decompress(data), np.uint8).reshape(2, -1)
        by_channel = np.ascontiguousarray(planes.T).view(np.uint16)
        shape = *kv.shape[:2], kv.shape[3], kv.shape[2]
        return np.ascontiguousarray(by_channel.reshape(shape).swapaxes(2, 3))

    return lambda: timed(encode, decode)


def by_lmcache(lmcache: Lmcache, given: Input, chunk_tokens: int) -> Callable[[], Turn]:
    """LMCache's default levels, measured by its own interpreter."""
    kv, heads = given.kv, given.heads

    def turn() -> Turn:
        coded = lmcache.code(kv, heads, chunk_tokens, default_bins(len(kv)))
        return Turn(coded.encode_s, coded.decode_s, coded.bytes, coded.back)

    return turn


def speeds(
    given: Input, chunk_tokens: int, threads: int, rounds: int, lmcache: Lmcache | None
) -> list[Measured]:
    """All codecs take turns, round by round; the first round warms up and is left out."""
    sets = instruction_sets()[::-1]
    runs = [(isa, 1) for isa in sets] + [(sets[0], n) for n in range(2, threads + 1)]
    turns = {
        (f"level {level}, {isa}", n): ours(given, chunk_tokens, level, isa, n)
        for isa, n in runs
        for level in LEVELS[1:]
    }
    turns["zstd -3 of the raw bytes", 1] = zstd_of_bytes(given)
    if lmcache:
        turns[LMCACHE, 1] = by_lmcache(lmcache, given, chunk_tokens)
    results = {key: Measured(*key) for key in turns}
    for i in track(range(rounds + 1), description=given.name):
        for key, turn in turns.items():
            done = turn()
            if i:
                results[key].add(given.kv, done)
    return list(results.values())


def sizes(given: Input, chunk_tokens: int, lmcache: Lmcache | None) -> dict[int, list[Size]]:
    """By bins of the published quantiser: everything at its error."""
    kv, heads, found = given.kv, given.heads, {}
    for bins in TIMES_SMALLER:
        schedule = np.full((2, len(kv)), bins)
        theirs = codec_sizes.published(kv, heads, chunk_tokens, schedule)
        zstd = codec_sizes.zstd_of_symbols(kv, chunk_tokens, schedule)
        found[bins] = [
            codec_sizes.at_error(kv, heads, chunk_tokens, theirs.errors),
            theirs,
            Size("its bins, zstd -3", zstd, theirs.errors),
        ]
        if lmcache:
            coded = lmcache.code(kv, heads, chunk_tokens, schedule)
            errors = codec_sizes.errors_of(coded.back, kv)
            found[bins].append(Size("its bins, LMCache", 8 * coded.bytes / kv.size, errors))
    return found


def peer_of(results: Sequence[Measured]) -> Measured | None:
    """LMCache's, where it took part."""
    return next((r for r in results if r.what == LMCACHE), None)


def verdicts_of(
    given: Input, results: Sequence[Measured], at_equal_error: dict[int, list[Size]]
) -> list[Verdict]:
    found = []
    for bins, target in TIMES_SMALLER.items():
        smaller = codec_sizes.BF16_BITS / at_equal_error[bins][0].bits
        what = f"{given.name}: times smaller than bf16, at the error of {bins} bins"
        found.append(Verdict(what, Summary.of([smaller]), target))
    peer = peer_of(results)
    if peer is None:
        return found
    share = at_equal_error[32][0].bits / at_equal_error[32][-1].bits
    what = f"{given.name}: of LMCache's bytes, at the error of 32 bins"
    found.append(Verdict(what, Summary.of([share]), SHARE_OF_LMCACHE, at_most=True))
    best = next(r for r in results if r.what.startswith(f"level {DEFAULT_LEVEL}"))
    for way in ("encode_mb_s", "decode_mb_s"):
        ratio = paired_ratio(getattr(best, way), getattr(peer, way))
        what = f"{given.name}: times LMCache's speed, {way[:6]}, {best.what}, one thread"
        found.append(Verdict(what, ratio, TIMES_LMCACHE))
    return found


def speed_table(given: Input, results: Sequence[Measured]) -> Table:
    columns = ["", "threads", "bits", "x bf16", "rms error", "encode MB/s", "decode MB/s"]
    peer = peer_of(results)
    rows = []
    for r in results:
        row = [r.what, str(r.threads), f"{r.bits:.3f}", f"{16 / r.bits:.2f}", f"{r.rms_error:.4f}"]
        row += [Summary.of(speeds).text() for speeds in (r.encode_mb_s, r.decode_mb_s)]
        if peer:
            pairs = (r.encode_mb_s, peer.encode_mb_s), (r.decode_mb_s, peer.decode_mb_s)
            row += [f"{paired_ratio(a, b).median:.1f}" for a, b in pairs]
        rows.append(row)
    columns += ["encode x LMCache", "decode x LMCache"] if peer else []
    return Table(f"{given.name}: speed of the whole path, {DTYPE}", columns, rows)


def size_table(given: Input, at_equal_error: dict[int, list[Size]]) -> Table:
    plain = codec_sizes.eight_bit(given.kv)
    rows = [_size_row("bf16", codec_sizes.BF16_BITS), _size_row(plain.what, plain.bits)]
    for bins, found in at_equal_error.items():
        rows += [_size_row(f"{size.what}, error of {bins} bins", size.bits) for size in found]
    title = f"{given.name}: size at equal error, everything included"
    return Table(title, ["", "bits", "x bf16"], rows)


def _size_row(what: str, bits: float) -> list[str]:
    return [what, f"{bits:.2f}", f"{codec_sizes.BF16_BITS / bits:.2f}"]


def draw(named: Sequence[tuple[str, Sequence[Measured]]], path: Path) -> None:
    """Encode and decode speeds, a panel per input."""
    figure, panels = charts.panels(len(named), columns=1)
    for axes, (name, results) in zip(panels, named, strict=True):
        at = np.arange(len(results))[::-1]
        for way, colour in zip(("encode", "decode"), charts.COLOURS, strict=False):
            medians = [Summary.of(getattr(r, f"{way}_mb_s")).median for r in results]
            axes.plot(medians, at, "o", color=colour, label=way)
        axes.grid(axis="y", alpha=0.3)
        threads = (f", {r.threads} threads" if r.threads > 1 else "" for r in results)
        axes.set_yticks(at, [r.what + n for r, n in zip(results, threads, strict=True)])
        axes.set_xscale("log")
        charts.whole_numbers(axes.xaxis)
        axes.set_xlabel("MB/s of bf16 KV, whole path")
        axes.set_title(name)
        axes.legend(loc="upper left")
    figure.set_size_inches(charts.WIDTH, sum(0.8 + 0.24 * len(r) for _, r in named))
    charts.save(figure, path)


def main(
    model: Annotated[
        str,
        typer.Option(
            callback=existing_model,
            help="Whose real KV to take.",
            show_default="the shipped demo model",
        ),
    ] = str(MODEL),
    tokens: Annotated[int, typer.Option(help="Tokens of each input.", min=2)] = 1024,
    chunk_tokens: Annotated[int, typer.Option(help="Tokens per chunk.", min=1, max=32_767)] = 256,
    layers: Annotated[int, typer.Option(help="Layers of the synthetic input.", min=1)] = 4,
    channels: Annotated[int, typer.Option(help="Its channels (8B models: 1024).", min=1)] = 1024,
    rounds: Annotated[int, typer.Option(help="Timed rounds of each.", min=1, max=1000)] = 5,
    threads: Annotated[
        int, typer.Option(help="The most threads; 0 for all cores.", min=0, max=64)
    ] = 0,
    lmcache_python: Annotated[
        Path | None,
        typer.Option(
            help="An interpreter whose environment has lmcache.", exists=True, dir_okay=False
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the speeds there.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the report there.")] = None,
) -> None:
    """The KV codec's speed and size, beside zstd and LMCache's codec for CPUs.

    Codecs take turns in every round: each instruction set of this machine on one thread, the best
    on more; zstd on the raw bytes; LMCache's if given. Sizes are at equal error: root mean square
    of every layer's K and V at most the published quantiser's.

    Example: `vllm-kvcompress bench codec --json results/codec.json --plot results/codec.png`
    """
    if layers * tokens * channels > MOST_VALUES:
        raise typer.BadParameter(
            f"{layers} layers x {tokens} tokens x {channels} channels are more than {MOST_VALUES}"
        )
    threads = threads or len(os.sched_getaffinity(0))
    parameters = dict(locals())
    try:
        real = sample(model, tokens=tokens, dtype=DTYPE)
    except CannotSample as error:
        raise typer.BadParameter(str(error)) from None
    made = synthetic(layers, tokens, channels)
    inputs = [
        Input(f"real, {real.kv.shape[3]} channels", real.kv, real.heads),
        Input(f"8B-like, {channels} channels", made, max(1, channels // HEAD_SIZE)),
    ]
    tables, verdicts, named, report = [], [], [], {}
    with ExitStack() as stack:
        try:
            lmcache = stack.enter_context(Lmcache(lmcache_python)) if lmcache_python else None
            for given in inputs:
                results = speeds(given, chunk_tokens, threads, rounds, lmcache)
                at_equal_error = sizes(given, chunk_tokens, lmcache)
                tables += [speed_table(given, results), size_table(given, at_equal_error)]
                verdicts += verdicts_of(given, results, at_equal_error)
                named.append((given.name, results))
                report[given.name] = {
                    "speeds": [asdict(result) for result in results],
                    "sizes": {n: [s.to_dict() for s in of] for n, of in at_equal_error.items()},
                }
        except LmcacheFailed as error:
            raise typer.BadParameter(str(error), param_hint="--lmcache-python") from None
    show_results(terminal(), tables, verdicts)
    if plot:
        draw(named, plot)
    if json:
        write_report(
            json,
            threads,
            parameters,
            bench="codec",
            title="The KV codec beside LMCache's and zstd",
            tables=tables,
            plots=[plot] if plot else (),
            verdicts=verdicts,
            lmcache=lmcache.version if lmcache else None,
            inputs=report,
        )
