"""`vllm-kvcompress bench ...`: the commands of the bench under one roof."""

import typer

from vllm_kvcompress.bench import throughput
from vllm_kvcompress.bench.options import ListCommand
from vllm_kvcompress.bench.quality import command as quality

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Measure what compression costs and buys, beside what you would use instead.",
)
app.command("quality", cls=ListCommand, epilog=quality.EPILOG)(quality.main)
app.command("throughput", cls=ListCommand)(throughput.main)
