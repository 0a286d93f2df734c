"""Which peer, as typed on the command line: `kvpress:SnapKVPress(kernel_size=21)`."""

import ast
from dataclasses import dataclass
from typing import Any, Self

FORM = (
    "kvpress:PRESS or kvpress:PRESS(name=value,...), such as kvpress:SnapKVPress(kernel_size=21)"
    " or kvpress:AdaKVPress(press=SnapKVPress)"
)
MAX_SPEC_CHARACTERS = 500


@dataclass(frozen=True)
class PeerSpec:
    """A press and its arguments, each a plain value or another press, in the order given."""

    press: str
    arguments: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """`kvpress:AdaKVPress(press=SnapKVPress(kernel_size=21))`; nothing in it is executed.

        Raises:
            ValueError: it is not of that form.
        """
        library, colon, press = text.partition(":")
        if library != "kvpress" or not colon or len(text) > MAX_SPEC_CHARACTERS:
            raise ValueError(f"{text[:80]!r} is no peer: write {FORM}")
        try:
            spec = cls._of(ast.parse(press.strip(), mode="eval").body)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise ValueError(f"{text!r} is no peer: write {FORM}") from None
        if "compression_ratio" in spec._names():
            raise ValueError(f"{text!r}: the budgets of the bench set compression_ratio")
        return spec

    @classmethod
    def _of(cls, node: ast.expr) -> Self:
        if isinstance(node, ast.Name):
            return cls(node.id)
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
            raise ValueError
        given = [(each.arg, cls._value(each.value)) for each in node.keywords if each.arg]
        if len({name for name, _ in given}) < len(node.keywords):
            raise ValueError
        return cls(node.func.id, tuple(given))

    @classmethod
    def _value(cls, node: ast.expr) -> Any:
        if isinstance(node, ast.Name | ast.Call):
            return cls._of(node)
        value = ast.literal_eval(node)
        if not isinstance(value, str | int | float | bool | None):
            raise ValueError
        return value

    def _names(self) -> set[str]:
        inner = [value for _, value in self.arguments if isinstance(value, PeerSpec)]
        return {name for name, _ in self.arguments}.union(*(spec._names() for spec in inner))

    def __str__(self) -> str:
        """The name of its row: as it was typed, without blanks."""
        return f"kvpress:{self._text()}"

    def _text(self) -> str:
        given = ",".join(
            f"{name}={value._text() if isinstance(value, PeerSpec) else repr(value)}"
            for name, value in self.arguments
        )
        return f"{self.press}({given})" if given else self.press

    def request(self) -> dict[str, Any]:
        """As the worker wants it."""
        arguments = {
            name: value.request() if isinstance(value, PeerSpec) else value
            for name, value in self.arguments
        }
        return {"press": self.press, "press_args": arguments}
