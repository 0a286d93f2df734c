"""How a vLLM function is wrapped: visibly, and once."""

import functools
from collections.abc import Callable
from typing import Any

MARK = "__kv_compress__"


def wrap(owner: type, name: str, around: Callable[..., Any]) -> None:
    """Replace `owner.name` by `around(original, ...)`, once; static and class methods stay so."""
    attribute = owner.__dict__[name]
    kind = type(attribute) if isinstance(attribute, staticmethod | classmethod) else None
    original = attribute.__func__ if kind else attribute
    if hasattr(original, MARK):
        return

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    setattr(wrapper, MARK, True)
    setattr(owner, name, kind(wrapper) if kind else wrapper)
