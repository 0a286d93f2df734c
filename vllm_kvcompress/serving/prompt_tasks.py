"""The class of a request that leaves it to us, told from its prompt before it reaches the engine.

It is written into the request's own knobs, where scheduler and workers read it. Nothing is
remembered from one request to the next.
"""

from collections.abc import Sequence
from typing import Any

from vllm_kvcompress.config import UNKNOWN_TASK, EngineConfig
from vllm_kvcompress.policy.task_models import task_classifier
from vllm_kvcompress.presets import Task

END_TOKENS = 256  # read from the beginning and from the end of a prompt


def tell_task(config: EngineConfig, request: Any, tokenizer: Any) -> None:
    """Replace `auto` in the knobs of an `EngineCoreRequest` by a class.

    `tokenizer` is the model's, None where the server has none.
    """
    params = request.sampling_params
    if params is None or not config.wants_task(params.extra_args):
        return
    task = _task_of(request.prompt_token_ids, tokenizer, config.task_classifier)
    params.extra_args = {**(params.extra_args or {}), "kv_compress_task": task}


def _task_of(token_ids: Sequence[int] | None, tokenizer: Any, classifier: str | None) -> Task:
    if not token_ids or tokenizer is None:
        return UNKNOWN_TASK
    ids = list(token_ids)
    if len(ids) > 2 * END_TOKENS:
        ids = ids[:END_TOKENS] + ids[-END_TOKENS:]
    return task_classifier(classifier).classify(tokenizer.decode(ids, skip_special_tokens=True))
