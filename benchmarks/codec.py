"""How fast and how small the KV codec is, beside zstd and LMCache's CacheGen codec for CPUs.

python benchmarks/codec.py --json codec.json
python benchmarks/codec.py --lmcache-python OTHER_VENV/bin/python   # one that has lmcache
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import numpy as np
import typer
import zstandard
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vllm_kvcompress.bench.harness import Summary, write_report
from vllm_kvcompress.transport.chunks import ChunkCodec
from vllm_kvcompress.transport.codec import as_bits, as_floats, instruction_sets
from vllm_kvcompress.transport.levels import LEVELS
from vllm_kvcompress.transport.sample import sample

DEMO_MODEL = Path(__file__).resolve().parent.parent / "vllm_kvcompress/demo_model"
DTYPE = "bfloat16"
REPORT_WIDTH = 110
LMCACHE_WORKER = Path(__file__).resolve().parent / "codec_lmcache.py"


@dataclass
class Measured:
    """One way to write one input down. Speeds are of the raw bf16 bytes, per second."""

    what: str
    threads: int
    bits: float  # per element, all included
    rms_error: float
    encode_mb_s: list[float] = field(default_factory=list)
    decode_mb_s: list[float] = field(default_factory=list)


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


def rounds_of(
    encode: Callable[[], list[bytes]], decode: Callable[[list[bytes]], Any], rounds: int
) -> Iterator[tuple[list[bytes], Any, float, float]]:
    """(encoded, decoded, seconds, seconds) of each round; the first warms up and is left out."""
    for i in range(rounds + 1):
        begun = perf_counter()
        data = encode()
        encoded = perf_counter()
        back = decode(data)
        if i:
            yield data, back, encoded - begun, perf_counter() - encoded


def ours(
    kv: np.ndarray, heads: int, level: int, chunk_tokens: int, isa: str, threads: int, rounds: int
) -> Measured:
    """Whole path: KV array to container and back, checksums and all."""
    codec = ChunkCodec(isa=isa, threads=threads)
    starts = range(0, kv.shape[2], chunk_tokens)
    parts = [np.ascontiguousarray(kv[:, :, s : s + chunk_tokens]) for s in starts]
    result = Measured(f"level {level}, {codec.sections.isa}", threads, 0, 0)
    timed = list(
        rounds_of(
            lambda: [codec.encode(part, DTYPE, level, heads=heads) for part in parts],
            lambda data: [codec.decode(d) for d in data],
            rounds,
        )
    )
    for _, _, encode_s, decode_s in timed:
        result.encode_mb_s.append(kv.nbytes / encode_s / 1e6)
        result.decode_mb_s.append(kv.nbytes / decode_s / 1e6)
    data, back, _, _ = timed[-1]
    result.bits = 8 * sum(map(len, data)) / kv.size
    result.rms_error = relative_error(np.concatenate(back, axis=2), kv)
    return result


def zstd_of_bytes(kv: np.ndarray, rounds: int) -> Measured:
    """zstd -3 of the raw cache, high and low bytes apart, channel by channel: lossless."""
    result = Measured("zstd -3 of the raw bytes", 1, 0, 0.0)

    def encode() -> list[bytes]:
        by_channel = np.ascontiguousarray(kv.swapaxes(2, 3)).view(np.uint8)
        planes = np.ascontiguousarray(by_channel.reshape(-1, 2).T)
        return [zstandard.compress(planes.tobytes(), 3)]

    def decode(data: list[bytes]) -> np.ndarray:
        planes = np.frombuffer(zstandard.decompress(data[0]), np.uint8).reshape(2, -1)
        by_channel = np.ascontiguousarray(planes.T).view(np.uint16)
        shape = *kv.shape[:2], kv.shape[3], kv.shape[2]
        return np.ascontiguousarray(by_channel.reshape(shape).swapaxes(2, 3))

    for data, back, encode_s, decode_s in rounds_of(encode, decode, rounds):
        assert (back == kv).all()
        result.encode_mb_s.append(kv.nbytes / encode_s / 1e6)
        result.decode_mb_s.append(kv.nbytes / decode_s / 1e6)
        result.bits = 8 * len(data[0]) / kv.size
    return result


def lmcache(python: Path, kv: np.ndarray, heads: int, chunk_tokens: int, rounds: int) -> Measured:
    """LMCache's codec on the same array, by an interpreter that has it."""
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "kv.npy", kv)
        options = {"heads": heads, "chunk_tokens": chunk_tokens, "rounds": rounds}
        command = [str(python), str(LMCACHE_WORKER), folder, json.dumps(options)]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode:
            last = (ran.stderr.strip() or "no message").splitlines()[-1]
            raise typer.BadParameter(f"{python}: {last}", param_hint="--lmcache-python")
        said = json.loads(ran.stdout.splitlines()[-1])
        back = np.load(Path(folder) / "back.npy")
    return Measured(
        f"LMCache {said['version']}, its default",
        1,
        8 * said["bytes"] / kv.size,
        relative_error(back, kv),
        [kv.nbytes / s / 1e6 for s in said["encode_s"]],
        [kv.nbytes / s / 1e6 for s in said["decode_s"]],
    )


def relative_error(back: np.ndarray, kv: np.ndarray) -> float:
    x = as_floats(kv, DTYPE).astype(np.float64)
    return float(np.sqrt(((as_floats(back, DTYPE) - x) ** 2).sum() / (x**2).sum()))


app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command()
def main(
    model: Annotated[str, typer.Option(help="Whose real KV to take.")] = str(DEMO_MODEL),
    tokens: Annotated[int, typer.Option(help="Tokens of each input.")] = 1536,
    chunk_tokens: Annotated[int, typer.Option(help="Tokens per chunk.")] = 256,
    layers: Annotated[int, typer.Option(help="Layers of the synthetic input.")] = 4,
    channels: Annotated[int, typer.Option(help="Its channels (8B models: 1024).")] = 1024,
    rounds: Annotated[int, typer.Option(help="Timed rounds of each.", min=1)] = 5,
    threads: Annotated[int, typer.Option(help="The most threads; 0 for all cores.")] = 0,
    lmcache_python: Annotated[
        Path | None, typer.Option(help="An interpreter whose environment has lmcache.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the report there.")] = None,
) -> None:
    """Bits per element and speed of the whole path, KV array to container and back.

    Every instruction set of this machine on one thread, the best one on more; zstd on the raw
    bytes; LMCache's codec if given. Speeds are of raw bf16 bytes; medians of the rounds.
    """
    threads = threads or len(os.sched_getaffinity(0))
    parameters = dict(locals())
    real = sample(model, tokens=tokens, dtype=DTYPE)
    inputs = {
        f"real, {real.kv.shape[3]} channels": (real.kv, real.heads),
        f"synthetic, {channels} channels": (synthetic(layers, tokens, channels), channels // 128),
    }
    console = Console(width=None if sys.stdout.isatty() else REPORT_WIDTH)
    report = {}
    for name, (kv, heads) in inputs.items():
        fastest = instruction_sets()[-1]
        runs = [(isa, 1) for isa in instruction_sets()[::-1]]
        runs += [(fastest, n) for n in range(2, threads + 1)]
        results = [
            ours(kv, heads, level, chunk_tokens, isa, n, rounds)
            for isa, n in track(runs, description=name)
            for level in LEVELS[1:]
        ]
        results.append(zstd_of_bytes(kv, rounds))
        if lmcache_python:
            results.append(lmcache(lmcache_python, kv, heads, chunk_tokens, rounds))
        console.print(_table(name, results))
        report[name] = [asdict(result) for result in results]
    if json:
        write_report(json, threads, parameters, inputs=report)


def _table(name: str, results: list[Measured]) -> Table:
    table = Table(title=f"{name}, {DTYPE}, whole path")
    table.add_column()
    for column in ("threads", "bits", "x bf16", "rms error", "encode MB/s", "decode MB/s"):
        table.add_column(column, justify="right")
    for r in results:
        table.add_row(
            *(r.what, str(r.threads), f"{r.bits:.3f}", f"{16 / r.bits:.2f}", f"{r.rms_error:.4f}"),
            *(Summary.of(speeds).text() for speeds in (r.encode_mb_s, r.decode_mb_s)),
        )
    return table


if __name__ == "__main__":
    app()
