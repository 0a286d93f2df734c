"""The task class of a request that leaves it to us, from the token ids of its prompt.

It is told once, when the scheduler is given the request, and written into the request's knobs,
where the workers read it. Nothing is remembered from one request to the next.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from vllm.tokenizers import cached_tokenizer_from_config

from vllm_kvcompress.config import UNKNOWN_TASK
from vllm_kvcompress.policy.tasks import shipped_classifier
from vllm_kvcompress.presets import Task

END_TOKENS = 256  # read from the beginning and from the end of a prompt


class PromptTasks:
    """Tells task classes with the model's own tokenizer, loaded with the first question."""

    def __init__(self, model_config: Any) -> None:
        self._model_config = model_config

    def of(self, token_ids: Sequence[int] | None) -> Task:
        """The class of a prompt; `UNKNOWN_TASK` where there are no tokens or no tokenizer."""
        if not token_ids or self._tokenizer is None:
            return UNKNOWN_TASK
        ids = list(token_ids)
        ends = ids if len(ids) <= 2 * END_TOKENS else ids[:END_TOKENS] + ids[-END_TOKENS:]
        return shipped_classifier().classify(self._tokenizer.decode(ends, skip_special_tokens=True))

    @cached_property
    def _tokenizer(self) -> Any:
        return cached_tokenizer_from_config(self._model_config)
