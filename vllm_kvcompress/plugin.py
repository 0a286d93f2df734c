"""The door: what vLLM loads through `vllm.general_plugins`, in every process.

Three wrappers that stay for good and do nothing while the flag is off; `docs/compat.md` names
them and a test counts them. Three more are installed by the first engine that compresses or
has a store (`vllm_kvcompress/serving/attach.py`), and see to that engine only.
"""

from collections.abc import Callable
from typing import Any

from vllm_kvcompress.wrapping import wrap


def register() -> None:
    """Wrap `EngineArgs.add_cli_args`, `.from_cli_args` and `.create_engine_config`, once."""
    from vllm.engine.arg_utils import EngineArgs

    wrap(EngineArgs, "add_cli_args", _add_cli_args)
    wrap(EngineArgs, "from_cli_args", _from_cli_args)
    wrap(EngineArgs, "create_engine_config", _create_engine_config)


def _add_cli_args(original: Callable[..., Any], parser: Any, *args: Any, **kwargs: Any) -> Any:
    parser = original(parser, *args, **kwargs)
    from vllm_kvcompress.serving.flags import add_flags

    add_flags(parser)
    return parser


def _from_cli_args(original: Callable[..., Any], cls: type, args: Any) -> Any:
    from vllm_kvcompress.serving.flags import apply_flags

    is_on = apply_flags(args)
    engine_args = original(cls, args)
    if is_on:
        engine_args.kv_compress_from_cli = True
    return engine_args


def _create_engine_config(
    original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any
) -> Any:
    from vllm_kvcompress.config import StartupError, uses_store, wants_compression

    compresses = wants_compression(self.additional_config)
    if not compresses and not uses_store(self):
        return original(self, *args, **kwargs)
    from vllm_kvcompress.engine.setup import configured
    from vllm_kvcompress.serving.attach import attach
    from vllm_kvcompress.serving.flags import stop
    from vllm_kvcompress.transport.setup import add_connector, check_connector

    try:
        if compresses:
            add_connector(self)
            vllm_config = configured(original, self, *args, **kwargs)
        else:
            vllm_config = original(self, *args, **kwargs)
        if uses_store(vllm_config):
            check_connector(vllm_config)
    except StartupError as error:
        if getattr(self, "kv_compress_from_cli", False):
            stop(error)
        raise
    attach()
    return vllm_config
