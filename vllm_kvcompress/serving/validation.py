"""A request's knobs are checked in the API process, before anything reaches the engine."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError

from vllm_kvcompress.accounting import Settings
from vllm_kvcompress.config import (
    parse_engine_config,
    uses_store,
    wants_compression,
)
from vllm_kvcompress.knobs import REQUEST_KEYS, REQUEST_PREFIX, KnobError
from vllm_kvcompress.presets import shorten
from vllm_kvcompress.serving.metrics import refusals_counter
from vllm_kvcompress.transport.knobs import KNOB_PREFIX, knobs_of

PARAMETER_CHARACTERS = 80


class RefusedKnob(VLLMValidationError, ValueError):
    """HTTP 400 over the API, a `ValueError` in Python."""

    def __str__(self) -> str:
        return str(self.args[0])


class RequestCheck:
    """Called with a request's `SamplingParams`; checks, then lets vLLM check (`then`).

    One stands in each `InputProcessor`, so that every engine of a process has its own presets
    and context length.
    """

    def __init__(self, vllm_config: VllmConfig, then: Callable[[Any], None]) -> None:
        additional = vllm_config.additional_config
        compresses = wants_compression(additional)
        self.config = parse_engine_config(additional["kv_compress"]) if compresses else None
        self._has_store = uses_store(vllm_config)
        self._max_tokens = vllm_config.model_config.max_model_len
        self._model_name = vllm_config.model_config.served_model_name
        self._then = then
        self.refusals: Counter[str] = Counter()

    def __call__(self, params: Any) -> None:
        """Raise `RefusedKnob` naming the key, the value and what is allowed."""
        try:
            if self.config is not None:
                settings = self.config.request_settings(params.extra_args, self._max_tokens)
                _refuse_prompt_logprobs(params, settings)
            knobs_of(params.extra_args, self._has_store)
        except KnobError as error:
            self.refusals[error.reason] += 1
            refusals_counter().labels(self._model_name, error.reason).inc()
            raise RefusedKnob(str(error), parameter=error.knob[:PARAMETER_CHARACTERS]) from None
        self._then(params)


def _refuse_prompt_logprobs(params: Any, settings: Settings | None) -> None:
    if settings is None or params.prompt_logprobs is None:
        return
    if settings.tsp_rate is not None or settings.tsp_tokens is not None:
        raise KnobError(
            "prompt_logprobs",
            "tsp_prompt_logprobs",
            f"prompt_logprobs={params.prompt_logprobs} is not allowed with preset "
            f"{settings.preset!r}, whose deep layers see only selected tokens of the prompt: "
            "leave it out, or take another preset",
        )


def refuse_knobs_of_beam_search(xargs: Mapping[str, Any] | None) -> None:
    """Raise `RefusedKnob` for any of our knobs: vLLM hands none on to a beam search."""
    for key, value in (xargs or {}).items():
        if key in REQUEST_KEYS or key.startswith((f"{REQUEST_PREFIX}_", KNOB_PREFIX)):
            raise RefusedKnob(
                f"{shorten(key)} (given {shorten(value)}) has no effect on a beam search, which "
                "runs with the server's own preset: leave it out",
                parameter=key[:PARAMETER_CHARACTERS],
            )
