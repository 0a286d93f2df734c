"""`vllm-kvcompress profile | codec`: make a model's profile, and see what the codec does to it."""

import json
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from vllm_kvcompress.transport.chunks import ChunkCodec
from vllm_kvcompress.transport.codec import CodecMissing
from vllm_kvcompress.transport.levels import Quantiser
from vllm_kvcompress.transport.profile import Profile, build
from vllm_kvcompress.transport.report import LevelSize, eight_bit, level_sizes, plot, raw_bits
from vllm_kvcompress.transport.sample import Sample, sample

Model = Annotated[str, typer.Option(help="A model folder or Hugging Face id.")]
Prompt = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, help="Text of your own; default: made-up stories."),
]
Tokens = Annotated[int, typer.Option(min=2, max=131072, help="How much of the text, at most.")]
Dtype = Annotated[str, typer.Option(help="The cache's: bfloat16, float16, float32.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(profile)
    app.command()(codec)


def profile(
    model: Model,
    out: Annotated[Path, typer.Option(help="The profile, a safetensors file.")],
    prompt: Prompt = None,
    tokens: Tokens = 4096,
    dtype: Dtype = "bfloat16",
    quantiser: Annotated[Quantiser, typer.Option(help="What lossy levels use.")] = Quantiser.FIXED,
) -> None:
    """Measure a model's KV statistics once, so that stored chunks need no tables of their own.

    Give the file to the connector as `"profile": "FILE"`, on every machine that shares a store:
    chunks name the profile they were coded with.

    Example: `vllm-kvcompress profile --model MODEL --out model.profile`
    """
    measured = _sample(model, prompt, tokens, dtype)
    made = build(measured.kv, dtype, measured.heads, quantiser)
    try:
        out.write_bytes(made.to_bytes())
    except OSError as error:
        _fail(f"cannot write {out}: {error.strerror}")
    layers, _, seen, channels = measured.kv.shape
    typer.echo(
        f"{out}: {layers} layers x K, V x {channels} channels from {seen} tokens, "
        f"{out.stat().st_size / 1e6:.2f} MB, digest {made.digest}"
    )


def codec(
    model: Model,
    prompt: Prompt = None,
    tokens: Tokens = 2048,
    dtype: Dtype = "bfloat16",
    chunk_tokens: Annotated[int, typer.Option(min=1, max=32767, help="Tokens per chunk.")] = 256,
    profile: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Made by `profile`.")
    ] = None,
    plot_to: Annotated[
        Path | None, typer.Option("--plot", help="Draw it: a .png, .svg or .pdf.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The report as JSON.")] = False,
) -> None:
    """Show how large a model's KV cache is at every level, and by layer.

    Beside it stand the raw cache, 8 bits with a scale per token, zstd on the same integers, and
    their entropy (order 0, per channel, over the whole text: no chunk's tables come for free).

    Example: `vllm-kvcompress codec --model MODEL --prompt text.txt --plot sizes.png`
    """
    measured = _sample(model, prompt, tokens, dtype)
    try:
        coder = ChunkCodec(Profile.load(profile) if profile else None)
    except (CodecMissing, ValueError, OSError) as error:
        _fail(str(error))
    sizes = level_sizes(measured, coder, chunk_tokens)
    if plot_to:
        try:
            plot(sizes, measured, plot_to)
        except ImportError:
            _fail("--plot needs matplotlib: pip install matplotlib")
        except (OSError, ValueError) as error:
            _fail(f"--plot {plot_to}: {error}")
    if as_json:
        report = {
            "model": model,
            "shape": measured.kv.shape,
            "chunk_tokens": chunk_tokens,
            "raw": raw_bits(measured),
            "eight_bit": eight_bit(measured),
            "levels": [size.to_dict() for size in sizes],
        }
        typer.echo(json.dumps(report, indent=2))
    else:
        _print(sizes, measured, chunk_tokens)


def _print(sizes: list[LevelSize], measured: Sample, chunk_tokens: int) -> None:
    layers, _, tokens, channels = measured.kv.shape
    raw, console = raw_bits(measured), Console()
    whole = Table(
        *("level", "stored", "x under raw", "8-bit", "zstd -3", "entropy", "rms error"),
        *("by profile",),
        title=f"bits per KV element: {layers} layers, {channels} channels, {tokens} tokens, "
        f"chunks of {chunk_tokens}, everything included; raw {raw}",
    )
    for size in sizes:
        whole.add_row(
            str(size.level),
            f"{size.stored:.3f}",
            f"{raw / size.stored:.2f}",
            f"{eight_bit(measured):.2f}",
            f"{size.zstd:.3f}",
            "-" if size.entropy != size.entropy else f"{size.entropy:.3f}",
            f"{size.error:.4f}",
            f"{size.profile_share:.0%}",
        )
    console.print(whole)
    by_layer = Table("layer", *(f"{size.level}: K / V" for size in sizes), title="by layer")
    for layer in range(layers):
        pairs = (size.by_layer[layer] for size in sizes)
        by_layer.add_row(str(layer), *(f"{k:.2f} / {v:.2f}" for k, v in pairs))
    console.print(by_layer)


def _sample(model: str, prompt: Path | None, tokens: int, dtype: str) -> Sample:
    try:
        return sample(model, prompt, tokens, dtype)
    except (OSError, ValueError) as error:
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    typer.echo(f"vllm-kvcompress: {message}", err=True)
    raise typer.Exit(2) from None
