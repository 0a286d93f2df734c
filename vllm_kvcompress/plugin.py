"""The door: what vLLM loads through `vllm.general_plugins`, in every process.

Three wrappers, each undone by nothing and doing nothing while the flag is off; `docs/compat.md`
names them and a test counts them.
"""

import functools
from collections.abc import Callable
from typing import Any

MARK = "__kv_compress__"


def register() -> None:
    """Wrap `EngineArgs.add_cli_args`, `.from_cli_args` and `.create_engine_config`, once."""
    from vllm.engine.arg_utils import EngineArgs

    if hasattr(EngineArgs.create_engine_config, MARK):
        return
    EngineArgs.create_engine_config = _wrapped(EngineArgs.create_engine_config, _create_engine_config)


def _wrapped(original: Callable[..., Any], around: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    setattr(wrapper, MARK, True)
    return wrapper


def _create_engine_config(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    if not (self.additional_config or {}).get("kv_compress"):
        return original(self, *args, **kwargs)
    from vllm_kvcompress.engine.setup import configured

    return configured(original, self, *args, **kwargs)
