"""`vllm-kvcompress`: its commands; the bench's and CacheGen's are in rooms of their own."""

import json
import re
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from vllm_kvcompress.bench.cli import app as bench
from vllm_kvcompress.bench.tune.command import app as tune
from vllm_kvcompress.presets import (
    DEFAULT_PRESET,
    MAX_RATE,
    Preset,
    read_text,
    shipped_presets,
)
from vllm_kvcompress.transport import commands as transport_commands
from vllm_kvcompress.verify import CannotVerify, Report, verify_server

app = typer.Typer(
    name="vllm-kvcompress",
    help="Compress the KV caches of vLLM per attention head. Start a server with "
    "`vllm serve MODEL --kv-compress`, then try `vllm-kvcompress verify`.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
OK, NOT_COMPRESSED, CANNOT_TELL = 0, 1, 2


@app.command()
def presets(
    as_json: Annotated[bool, typer.Option("--json", help="Every field, as JSON.")] = False,
) -> None:
    """List the presets for `--kv-compress PRESET` and for a request's `kv_compress`.

    To change one: `--kv-compress snapkv --kv-compress-config '{"rate": 4}'`. To write your own:
    copy a file of configs/ and give it to `--kv-compress FILE.yaml`.
    """
    shipped = shipped_presets()
    if as_json:
        plain = [preset.model_dump(mode="json") for preset in shipped.values()]
        typer.echo(json.dumps(plain, indent=2))
        return
    table = Table()
    for column in ("preset", "what it is", "rate", "window", "scorer", "allocator"):
        table.add_column(column, no_wrap=column == "preset")
    for preset in sorted(shipped.values(), key=lambda p: (p.name != DEFAULT_PRESET, p.name)):
        table.add_row(*_row(preset))
    Console().print(table)
    typer.echo(
        f"The default is {DEFAULT_PRESET}; `off` compresses only where a request asks, and so does "
        "`cachegen`, which keeps prompts' caches in a store (`--kv-compress-store URL`)."
    )


def _row(preset: Preset) -> tuple[str, ...]:
    kept = f"{preset.budget_tokens} tokens" if preset.budget_tokens else f"{preset.rate:g}"
    parts = preset.scorer.name, preset.allocator.name
    return preset.name, preset.description, kept, str(preset.window_tokens), *parts


@app.command()
def verify(
    url: Annotated[str, typer.Option(help="Where the server listens.")] = "http://localhost:8000",
    api_key: Annotated[
        str, typer.Option(help="As given to `vllm serve --api-key`.", envvar="VLLM_API_KEY")
    ] = "",
    model: Annotated[str, typer.Option(help="Served model name; default: the first.")] = "",
    preset: Annotated[str, typer.Option(help="Default: the server's own.")] = "",
    rate: Annotated[float, typer.Option(min=1, max=MAX_RATE, help="Compression rate.")] = 8.0,
    tokens: Annotated[int, typer.Option(min=64, help="Length of the prompt, about.")] = 2000,
    prompt_file: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A prompt of your own.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The report as JSON.")] = False,
) -> None:
    """Send a long prompt with compression off and on, and show what was freed.

    Exit code 0: the server compressed it. 1: it did not. 2: no answer to judge by.

    Example: `vllm-kvcompress verify --url http://localhost:8000 --preset snapkv --rate 4`
    """
    try:
        report = verify_server(
            url,
            api_key=api_key,
            model=model,
            preset=preset,
            rate=rate,
            tokens=tokens,
            prompt=_read(prompt_file) if prompt_file else None,
        )
    except CannotVerify as error:
        typer.echo(f"vllm-kvcompress verify: {error}", err=True)
        raise typer.Exit(NOT_COMPRESSED if error.not_compressed else CANNOT_TELL) from None
    typer.echo(json.dumps(report.to_dict(), indent=2) if as_json else _text(report))
    raise typer.Exit(OK if report.compressed else NOT_COMPRESSED)


MOST_ARCHITECTURES = 16


def _architectures(given: list[str] | None) -> list[str] | None:
    if not given:
        return given
    if wrong := [name for name in given if not re.fullmatch(r"sm_\d{2,3}[af]?", name)]:
        raise typer.BadParameter(f"{wrong[0]!r}: give one as nvcc names it, such as sm_90")
    if len(given) > MOST_ARCHITECTURES:
        raise typer.BadParameter(f"at most {MOST_ARCHITECTURES} at a time")
    return given


@app.command()
def build_cuda(
    arch: Annotated[
        list[str] | None,
        typer.Option(
            callback=_architectures,
            metavar="SM_NN",
            help="A GPU's architecture: sm_80 (A100), sm_90 (H100, H200), sm_100 (B200). May be "
            "given more than once. Default: the GPU of this machine.",
        ),
    ] = None,
    in_package: Annotated[
        bool,
        typer.Option(
            "--in-package",
            help="Beside the sources in the installed package, for all its users and for images. "
            "Default: in $XDG_CACHE_HOME/vllm-kvcompress, or ~/.cache, for you.",
        ),
    ] = False,
) -> None:
    """Build the CUDA kernels now, so that no server does at its first start.

    Needs nvcc, but no GPU where --arch says for which. Takes a minute per architecture; what is
    built already is left as it is.

    Example: `vllm-kvcompress build-cuda --arch sm_80 --arch sm_90 --in-package`
    """
    from vllm_kvcompress.kernels import library

    try:
        for name in arch or [library.this_architecture()]:
            folder = library.IN_PACKAGE if in_package else None
            typer.echo(f"{name}: {library.build(name, folder)}")
    except library.CannotBuild as error:
        typer.echo(f"vllm-kvcompress build-cuda: {error}", err=True)
        raise typer.Exit(1) from None


def _read(prompt_file: Path) -> str:
    try:
        prompt = read_text(prompt_file)
    except ValueError as error:
        raise CannotVerify(str(error)) from None
    if not prompt.strip():
        raise CannotVerify(f"{prompt_file} holds no prompt")
    return prompt


def _text(report: Report) -> str:
    lines = [
        f"model         {report.model}",
        f"prompt        {report.prompt_tokens} tokens",
        f"answer, off   {report.answer_off!r}",
        f"answer, on    {report.answer_on!r}",
        f"answers       {'agree' if report.answers_agree else 'differ'}",
    ]
    if not report.compressed:
        return "\n".join([*lines, f"NOT COMPRESSED: {report.reason}"])
    kernels = ", ".join(f"{task} {'+'.join(names)}" for task, names in report.kernels.items())
    return "\n".join(
        [
            *lines,
            f"blocks held   {report.blocks_before} -> {report.blocks_after}",
            f"tokens held   {report.held_tokens} of {report.prompt_tokens} per head "
            f"({report.held_share:.1%})",
            f"kernels       {kernels}",
            f"COMPRESSED by {report.preset}",
        ]
    )


transport_commands.register(app)
app.add_typer(bench, name="bench")
app.add_typer(tune, name="tune")

if __name__ == "__main__":
    app()
