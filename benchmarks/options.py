"""`--rates 1 8` beside `--rates 1 --rates 8`: lists as people type them."""

from collections.abc import Iterable, Sequence

from typer import Context
from typer.core import TyperCommand, TyperOption


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
