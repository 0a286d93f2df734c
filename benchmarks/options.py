"""Options that several commands have, and lists as people type them: `--rates 1 8`."""

from collections.abc import Iterable, Sequence
from typing import Annotated

from typer import BadParameter, Context, Option
from typer.core import TyperCommand, TyperOption


def _in_heads_of_64(hidden: int) -> int:
    if hidden % 64:
        raise BadParameter(f"{hidden} is no multiple of 64")
    return hidden


def _known_dtype(dtype: str) -> str:
    if dtype and dtype not in DTYPES:
        raise BadParameter(f"{dtype!r} is none of {', '.join(DTYPES)}")
    return dtype


DTYPES = ("auto", "float32", "bfloat16", "float16")
_AS_VLLMS = f"As vLLM's: {', '.join(DTYPES)}."
Dtype = Annotated[str, Option(callback=_known_dtype, help=_AS_VLLMS)]
ModelsDtype = Annotated[
    str, Option(callback=_known_dtype, help=_AS_VLLMS, show_default="the model's")
]
Threads = Annotated[int, Option(min=0, help="OpenMP threads; 0: all cores.")]
Hidden = Annotated[
    int,
    Option(
        min=64,
        callback=_in_heads_of_64,
        help="The random model's hidden size, a multiple of 64.",
    ),
]


class ListCommand(TyperCommand):
    """A command whose options of many values take them all behind one flag."""

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
        many = [p for p in self.params if isinstance(p, TyperOption) and p.multiple]
        return super().parse_args(ctx, repeat_options(args, [o for p in many for o in p.opts]))


def repeat_options(arguments: Sequence[str], options: Iterable[str]) -> list[str]:
    """`--rates 1 8` as `--rates 1 --rates 8`, which is how the parser knows lists."""
    lists, out = set(options), []
    current: str | None = None
    for argument in arguments:
        if argument in lists:
            current = argument
        elif current is None or argument.startswith("--"):
            current = None
            out.append(argument)
        else:
            out += [current, argument]
    return out
