"""`vllm-kvcompress bench ...`: the commands of the bench under one roof."""

from importlib.util import find_spec

import typer

from vllm_kvcompress.bench import (
    attention,
    codec,
    gpu_check,
    prefill,
    reuse,
    serve,
    stream,
    throughput,
)
from vllm_kvcompress.bench.options import BenchCommand, ListCommand
from vllm_kvcompress.bench.parity import command as parity
from vllm_kvcompress.bench.quality import command as quality
from vllm_kvcompress.bench.report import command as report

NEEDS = ("datasets", "jinja2", "matplotlib", "openai", "rapidfuzz")  # the extra `bench`

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Measure what compression costs and buys, beside what you would use instead.",
)


@app.callback()
def check_extra() -> None:
    """Raises typer.Exit with one line where packages of the bench are missing."""
    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        typer.echo(
            f"vllm-kvcompress bench also needs {', '.join(missing)}: "
            "pip install 'vllm-kvcompress[bench]'",
            err=True,
        )
        raise typer.Exit(2)


app.command("quality", cls=ListCommand, epilog=quality.EPILOG)(quality.main)
app.command("parity", cls=ListCommand)(parity.main)
app.command("throughput", cls=ListCommand)(throughput.main)
app.command("serve", cls=ListCommand)(serve.main)
app.command("attention", cls=ListCommand)(attention.main)
app.command("prefill", cls=ListCommand)(prefill.main)
app.command("reuse", cls=BenchCommand)(reuse.main)
app.command("codec", cls=BenchCommand)(codec.main)
app.command("stream", cls=ListCommand)(stream.main)
app.command("report", cls=BenchCommand)(report.main)


@app.command(
    "gpu",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def gpu(context: typer.Context) -> None:
    """What only a GPU can say: kernels, graphs, words, bandwidth, codec, speed (8 minutes)."""
    raise typer.Exit(gpu_check.main(context.args, context.command_path))
