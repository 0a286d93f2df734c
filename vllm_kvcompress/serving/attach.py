"""Wrappers that exist only once an engine with compression, or a store, is configured here.

    InputProcessor._build_logits_processors_params_validator   a request's knobs are checked
    InputProcessor.process_inputs                              the class of its task is told
    StatLoggerManager.__init__                                 our figures leave vLLM's statistics

All ask the `VllmConfig` they are given, so another engine in the process is not affected. And
in an API server of such an engine:

    ChatCompletionRequest.to_beam_search_params                knobs are refused there
    CompletionRequest.to_beam_search_params
"""

from collections.abc import Callable
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.metrics.loggers import StatLoggerManager

from vllm_kvcompress.config import uses_store, wants_compression
from vllm_kvcompress.wrapping import wrap


def attach() -> None:
    """Install the three wrappers, once."""
    wrap(InputProcessor, "_build_logits_processors_params_validator", _build_validator)
    wrap(InputProcessor, "process_inputs", _process_inputs)
    wrap(StatLoggerManager, "__init__", _init_stat_loggers)


def _build_validator(original: Callable[..., Any], self: InputProcessor) -> Callable[[Any], None]:
    validate = original(self)
    if not _is_ours(self.vllm_config):
        return validate
    from vllm_kvcompress.serving.validation import RequestCheck

    return RequestCheck(self.vllm_config, then=validate)


def _process_inputs(
    original: Callable[..., Any], self: InputProcessor, *args: Any, **kwargs: Any
) -> Any:
    request = original(self, *args, **kwargs)
    check: Any = self.validate_logits_processors_params
    if _is_ours(self.vllm_config) and check.config is not None:
        from vllm_kvcompress.serving.prompt_tasks import tell_task

        tell_task(check.config, request, self.tokenizer)
    return request


def _init_stat_loggers(
    original: Callable[..., Any],
    self: StatLoggerManager,
    vllm_config: VllmConfig,
    engine_idxs: list[int] | None = None,
    custom_stat_loggers: list[Any] | None = None,
    **kwargs: Any,
) -> None:
    if _is_ours(vllm_config):
        from vllm_kvcompress.serving.metrics import KVCompressStatLogger

        custom_stat_loggers = [KVCompressStatLogger, *(custom_stat_loggers or [])]
    original(self, vllm_config, engine_idxs, custom_stat_loggers, **kwargs)


def _is_ours(vllm_config: VllmConfig) -> bool:
    return wants_compression(vllm_config.additional_config) or uses_store(vllm_config)


def attach_to_requests() -> None:
    """In an API server: refuse knobs where vLLM would drop them unseen, in a beam search."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    for request in (ChatCompletionRequest, CompletionRequest):
        wrap(request, "to_beam_search_params", _to_beam_search_params)


def _to_beam_search_params(original: Callable[..., Any], self: Any, *args: Any) -> Any:
    from vllm_kvcompress.serving.validation import refuse_knobs_of_beam_search

    refuse_knobs_of_beam_search(self.vllm_xargs)
    return original(self, *args)
