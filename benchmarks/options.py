"""Options that several commands have, and lists as people type them: `--rates 1 8`."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from typer import BadParameter, Context, Exit, Option, echo
from typer.core import TyperCommand, TyperOption

from vllm_kvcompress.bench.errors import BenchError


def _in_heads_of_64(hidden: int) -> int:
    if hidden % 64:
        raise BadParameter(f"{hidden} is no multiple of 64")
    return hidden


def _known_dtype(dtype: str) -> str:
    if dtype and dtype not in DTYPES:
        raise BadParameter(f"{dtype!r} is none of {', '.join(DTYPES)}")
    return dtype


def existing_model(model: str | None) -> str | None:
    """Raises BadParameter where a model is written as a folder that is not there."""
    if model and model.startswith(("/", ".", "~")) and not Path(model).expanduser().is_dir():
        raise BadParameter(f"there is no model folder {model}")
    return model


CANNOT_MEASURE = 2
DTYPES = ("auto", "float32", "bfloat16", "float16")
MOST_SEED = 2**31
_AS_VLLMS = f"As vLLM's: {', '.join(DTYPES)}."
Dtype = Annotated[str, Option(callback=_known_dtype, help=_AS_VLLMS)]
ModelsDtype = Annotated[
    str, Option(callback=_known_dtype, help=_AS_VLLMS, show_default="the model's")
]
Threads = Annotated[int, Option(min=0, help="OpenMP threads; 0: all cores.")]
Model = Annotated[
    str,
    Option(
        callback=existing_model,
        help="A model folder or Hugging Face id.",
        show_default="the shipped demo model",
    ),
]
Hidden = Annotated[
    int,
    Option(
        min=64,
        callback=_in_heads_of_64,
        help="The random model's hidden size, a multiple of 64.",
    ),
]


OUTPUTS = ("json", "plot")
"""Options that name a file to write."""


def check_writable(path: Path) -> None:
    """Raises BenchError before minutes are spent on a report that nobody could write."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        there = path.exists()
        path.open("ab").close()
        if not there:
            path.unlink()
    except (OSError, ValueError) as error:
        raise BenchError(f"cannot write {path}: {getattr(error, 'strerror', error)}") from None


class BenchCommand(TyperCommand):
    """A command that ends with one line and exit code 2 where it cannot measure."""

    def invoke(self, ctx: Context) -> Any:
        try:
            for path in filter(None, map(ctx.params.get, OUTPUTS)):
                check_writable(path)
            return super().invoke(ctx)
        except BenchError as error:
            echo(f"{ctx.command_path}: {error}", err=True)
            raise Exit(CANNOT_MEASURE) from None


class ListCommand(BenchCommand):
    """A command whose options of many values take them all behind one flag."""

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
        many = [p for p in self.params if isinstance(p, TyperOption) and p.multiple]
        return super().parse_args(ctx, repeat_options(args, [o for p in many for o in p.opts]))


def repeat_options(arguments: Sequence[str], options: Iterable[str]) -> list[str]:
    """`--rates 1 8` as `--rates 1 --rates 8`, which is how the parser knows lists.

    Raises:
        BadParameter: an option of the lists has no value.
    """
    lists, out = set(options), []
    current: str | None = None
    for argument, following in pairwise([*arguments, "--"]):
        if argument in lists:
            current = argument
            if following.startswith("--"):
                raise BadParameter(f"option {argument} requires a value")
        elif current is None or argument.startswith("--"):
            current = None
            out.append(argument)
        else:
            out += [current, argument]
    return out
