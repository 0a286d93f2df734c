"""What the codec's levels do to answers: bits against KL divergence and recall.

python benchmarks/codec_quality.py --prompts 300 --json codec-quality.json --plot codec-quality.png
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.progress import track
from rich.table import Table
from transformers import DynamicCache

from vllm_kvcompress.bench import charts, codec_sizes
from vllm_kvcompress.bench.demo_model.evaluate import Encoded, Reader
from vllm_kvcompress.bench.demo_model.language import many_facts_task, needle_task
from vllm_kvcompress.bench.harness import write_report
from vllm_kvcompress.bench.lmcache_process import Lmcache
from vllm_kvcompress.bench.options import BenchCommand
from vllm_kvcompress.bench.terminal import terminal
from vllm_kvcompress.transport.chunks import ChunkCodec
from vllm_kvcompress.transport.codec import as_bits, as_floats
from vllm_kvcompress.transport.levels import (
    FIXED_STEP,
    LEVELS,
    LOSSY,
    Plan,
    Quantiser,
    Step,
    published_bins,
)
from vllm_kvcompress.transport.profile import Profile

DEMO_MODEL = Path(__file__).resolve().parent.parent / "vllm_kvcompress/demo_model"
DTYPE = "bfloat16"
LMCACHE_EVERY = 10  # it is slow, and sizes hardly differ
COARSE = Step(0.3, 0.7)  # where the published bins' smallest size is

Recode = Callable[[np.ndarray], tuple[np.ndarray, int]]
"""Float KV `[layers, 2, tokens, channels]` to what a reader gets back, and the bytes between."""


@dataclass
class Way:
    """One way to write a cache down, and what it did."""

    name: str
    family: str
    recode: Recode = field(repr=False)
    bits: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)  # mean over the answer's tokens, in nats
    right: int = 0

    def to_dict(self) -> dict[str, Any]:
        return _figures(self)


@dataclass
class Rewritten:
    """The values of another way in other bytes: only their size is asked, of some prompts."""

    name: str
    family: str
    of: Way
    size: Callable[[np.ndarray], float]  # float KV to bits per element
    every: int = 1  # of so many prompts one
    bits: list[float] = field(default_factory=list)
    kl = property(lambda self: self.of.kl)
    right = property(lambda self: self.of.right)

    def to_dict(self) -> dict[str, Any]:
        return _figures(self) | {"values_of": self.of.name, "sizes_of": len(self.bits)}


def _figures(way: Way | Rewritten) -> dict[str, Any]:
    means = {"bits": float(np.mean(way.bits)), "kl": float(np.mean(way.kl))}
    return {"name": way.name, "family": way.family, **means, "right": way.right}


def by_codec(codec: ChunkCodec, level: int, heads: int, chunk_tokens: int) -> Recode:
    def recode(kv: np.ndarray) -> tuple[np.ndarray, int]:
        bits, size, parts = as_bits(kv, DTYPE), 0, []
        for start in range(0, kv.shape[2], chunk_tokens):
            part = np.ascontiguousarray(bits[:, :, start : start + chunk_tokens])
            data = codec.encode(part, DTYPE, level, heads=heads)
            size += len(data)
            parts.append(codec.decode(data))
        return as_floats(np.concatenate(parts, axis=2), DTYPE), size

    return recode


def plain(kv: np.ndarray) -> tuple[np.ndarray, int]:
    """The cache as bf16."""
    return as_floats(as_bits(kv, DTYPE), DTYPE), 2 * kv.size


def eight_bit(kv: np.ndarray) -> tuple[np.ndarray, int]:
    """127 steps each side of a token's largest magnitude, and a 16-bit scale."""
    most = np.abs(kv).max(axis=3, keepdims=True)
    scale = np.where(most > 0, most, 1) / 127
    return (np.rint(kv / scale) * scale).astype(np.float32), kv.size + 2 * most.size


def schedule(level: int, layers: int) -> np.ndarray:
    """The published bins of a level, `[2, layers]`."""
    return np.array([published_bins(level, layer) for layer in range(layers)]).T


def zstd_size(level: int, chunk_tokens: int) -> Callable[[np.ndarray], float]:
    def size(kv: np.ndarray) -> float:
        bins = schedule(level, len(kv))
        return codec_sizes.zstd_of_symbols(as_bits(kv, DTYPE), chunk_tokens, bins)

    return size


def lmcache_size(
    lmcache: Lmcache, level: int, heads: int, chunk_tokens: int
) -> Callable[[np.ndarray], float]:
    def size(kv: np.ndarray) -> float:
        bins = schedule(level, len(kv))
        return 8 * lmcache.code(as_bits(kv, DTYPE), heads, chunk_tokens, bins).bytes / kv.size

    return size


def by_steps(steps: Step, heads: int, chunk_tokens: int) -> Recode:
    """Our codec with steps that no level has, multiples of the head's root mean square."""

    def recode(kv: np.ndarray) -> tuple[np.ndarray, int]:
        plan = Plan(np.full(2 * len(kv), FIXED_STEP, np.uint8), np.tile(np.float32(steps), len(kv)))
        bits, back = codec_sizes.coded(as_bits(kv, DTYPE), heads, chunk_tokens, plan, relative=True)
        return as_floats(back, DTYPE), round(bits * kv.size / 8)

    return recode


def ways(
    profile: Profile | None, heads: int, chunk_tokens: int, lmcache: Lmcache | None = None
) -> list[Way | Rewritten]:
    """Everything that is asked; LMCache's own bytes where its interpreter is given."""
    fixed, bins = ChunkCodec(profile), ChunkCodec(quantiser=Quantiser.PUBLISHED)
    published = {
        n: Way(
            f"published {n}", "published bins, our coder", by_codec(bins, n, heads, chunk_tokens)
        )
        for n in LOSSY
    }
    found: list[Way | Rewritten] = [
        Way("bf16", "bf16", plain),
        Way("8-bit", "8-bit", eight_bit),
        *(Way(f"level {n}", "ours", by_codec(fixed, n, heads, chunk_tokens)) for n in LEVELS[1:]),
        Way("steps .3, .7", "ours", by_steps(COARSE, heads, chunk_tokens)),
        *published.values(),
    ]
    for n, way in published.items():
        zstd = zstd_size(n, chunk_tokens)
        found.append(Rewritten(f"{way.name}, zstd -3", "published bins, zstd -3", way, zstd))
    for n, way in published.items() if lmcache else ():
        size = lmcache_size(lmcache, n, heads, chunk_tokens)
        found.append(Rewritten(f"{way.name}, LMCache", "LMCache", way, size, LMCACHE_EVERY))
    return found


@torch.inference_mode()
def ask(
    reader: Reader,
    row: Encoded,
    all_ways: list[Way | Rewritten],
    chunk_tokens: int,
    prompt: int = 0,
) -> bool:
    """Compute the prompt's full chunks, recode them each way, and read the answer off the rest.

    Returns whether the untouched cache answers right.
    """
    ids = torch.tensor([row.prompt + row.answer[:-1]])
    stored = (len(row.prompt) - 1) // chunk_tokens * chunk_tokens
    cache = reader.model(ids[:, :stored], use_cache=True, logits_to_keep=1).past_key_values
    kv = torch.stack([torch.stack([x.keys[0], x.values[0]]) for x in cache.layers])
    layers, _, heads, tokens, size = kv.shape
    flat = kv.transpose(2, 3).reshape(layers, 2, tokens, heads * size).numpy()
    want = torch.tensor(row.answer)

    def answer(values: np.ndarray) -> torch.Tensor:
        by_head = torch.from_numpy(values).view(layers, 2, tokens, heads, size).transpose(2, 3)
        recoded = DynamicCache()
        for layer in range(layers):
            recoded.update(by_head[layer, :1].clone(), by_head[layer, 1:].clone(), layer)
        out = reader.model(ids[:, stored:], past_key_values=recoded, logits_to_keep=len(row.answer))
        return out.logits[0].log_softmax(-1)  # [answer, vocabulary]

    full = answer(flat)
    for way in all_ways:
        if isinstance(way, Rewritten):
            if prompt % way.every == 0:
                way.bits.append(way.size(flat))
            continue
        values, size_bytes = way.recode(flat)
        said = answer(np.ascontiguousarray(values, np.float32))
        way.bits.append(8 * size_bytes / flat.size)
        way.kl.append(float((full.exp() * (full - said)).sum(-1).mean()))
        way.right += bool((said.argmax(-1) == want).all())
    return bool((full.argmax(-1) == want).all())


app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command(cls=BenchCommand)
def main(
    prompts: Annotated[int, typer.Option(help="Prompts, half needles, half many facts.")] = 300,
    tokens: Annotated[int, typer.Option(help="Tokens per prompt, about.")] = 1024,
    chunk_tokens: Annotated[int, typer.Option(help="Tokens per chunk.")] = 256,
    seed: Annotated[int, typer.Option(help="Decides every prompt.")] = 0,
    profile: Annotated[Path | None, typer.Option(help="Made by `profile`.", exists=True)] = None,
    threads: Annotated[int, typer.Option(help="Torch's threads.")] = 1,
    lmcache_python: Annotated[
        Path | None, typer.Option(help="An interpreter whose environment has lmcache.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw bits against KL and recall.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the report there.")] = None,
) -> None:
    """Bits per element, KL divergence to the full cache, and exact answers, on the demo model.

    The prompt's full chunks are written down and read back each way; the rest of the prompt is
    computed on top, as after a load. Sizes are as stored, everything included.
    """
    parameters = dict(locals())
    torch.set_num_threads(threads)
    reader, rng = Reader(DEMO_MODEL), Random(seed)
    heads = reader.model.config.num_key_value_heads
    full_right = 0
    with ExitStack() as stack:
        lmcache = stack.enter_context(Lmcache(lmcache_python)) if lmcache_python else None
        offline = Profile.load(profile) if profile else None
        all_ways = ways(offline, heads, chunk_tokens, lmcache)
        for i in track(range(prompts), description="prompts"):
            if i % 2 == 0:
                task = needle_task(rng, tokens, rng.random())
            else:
                task = many_facts_task(rng, tokens, 16)
            full_right += ask(reader, reader.encode(task), all_ways, chunk_tokens, i)
    table = Table(title=f"{prompts} prompts; the full cache answers {full_right} right")
    table.add_column()
    for column in ("bits", "x bf16", "KL", "right", "of the full cache"):
        table.add_column(column, justify="right")
    for way in all_ways:
        bits = float(np.mean(way.bits))
        table.add_row(
            *(way.name, f"{bits:.2f}", f"{16 / bits:.2f}", f"{np.mean(way.kl):.5f}"),
            *(str(way.right), f"{way.right / max(full_right, 1):.1%}"),
        )
    terminal().print(table)
    if plot:
        draw(all_ways, full_right, plot)
    if json:
        results = [way.to_dict() for way in all_ways]
        write_report(json, threads, parameters, full_right=full_right, ways=results)


def draw(all_ways: list[Way | Rewritten], full_right: int, path: Path) -> None:
    """Bits against KL, and against the share of the full cache's right answers."""
    figure, (kl, right) = charts.panels(2, columns=1)
    for i, family in enumerate(dict.fromkeys(way.family for way in all_ways)):
        members = [way for way in all_ways if way.family == family]
        members.sort(key=lambda way: float(np.mean(way.bits)))
        bits = [float(np.mean(way.bits)) for way in members]
        style = {"color": charts.COLOURS[i], "label": family, "marker": "osD^v<"[i], "ms": 4}
        kl.plot(bits, [max(float(np.mean(w.kl)), 1e-7) for w in members], **style)
        right.plot(bits, [100 * w.right / max(full_right, 1) for w in members], **style)
    kl.set_yscale("log")
    kl.set_ylabel("KL to the full cache, nats")
    kl.legend(fontsize=8)
    right.set_ylabel("right, % of the full cache's")
    for axes in (kl, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks([2, 3, 4, 6, 8, 12, 16], ["2", "3", "4", "6", "8", "12", "16"])
        axes.set_xlabel("bits per KV element, as stored")
    charts.save(figure, path)


if __name__ == "__main__":
    app()
