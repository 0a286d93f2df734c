"""The one place that turns `additional_config["kv_compress"]` into an engine configuration.

Chooses worker, scheduler, block size and runner, and refuses what is not supported, one line
each (`engine/refusals.py`), before any process starts.
"""

import os
from collections.abc import Callable
from typing import Any

import vllm
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_kvcompress.config import EngineConfig, StartupError, parse_engine_config
from vllm_kvcompress.engine.propagation_limits import with_tsp_capacity
from vllm_kvcompress.engine.refusals import (
    AFTER,
    BEFORE,
    refuse,
    refuse_platform,
    refuse_version,
)
from vllm_kvcompress.policy.registry import build
from vllm_kvcompress.policy.task_models import SequenceClassifier, task_classifier

CPU_BLOCK_TOKENS = 32
SLOW_CLASSIFIER_S = 0.05  # other requests wait meanwhile
CPU_WORKER = "vllm_kvcompress.engine.cpu.KVCompressCPUWorker"
SCHEDULER = "vllm_kvcompress.engine.scheduler.KVCompressScheduler"
ASYNC_SCHEDULER = "vllm_kvcompress.engine.scheduler.KVCompressAsyncScheduler"

logger = init_logger(__name__)


def configured(
    original: Callable[..., VllmConfig], engine_args: Any, *args: Any, **kwargs: Any
) -> VllmConfig:
    """`EngineArgs.create_engine_config` with compression on.

    Raises:
        StartupError: a `ValueError`: the setting is wrong, or the model or another feature is
            not supported.
    """
    refuse_version(vllm.__version__)
    refuse_platform(current_platform)
    refuse(BEFORE, engine_args)
    config = _checked(engine_args.additional_config["kv_compress"])
    engine_args.additional_config = {
        **engine_args.additional_config,
        "kv_compress": config.to_dict(),
    }
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    engine_args.worker_cls = CPU_WORKER
    if engine_args.block_size is None and current_platform.is_cpu():
        engine_args.block_size = CPU_BLOCK_TOKENS
    vllm_config = original(engine_args, *args, **kwargs)
    engine_args.worker_cls = "auto"
    refuse(AFTER, vllm_config)
    _check_for_model(config, vllm_config)
    config = with_tsp_capacity(config, vllm_config)
    vllm_config.additional_config["kv_compress"] = config.to_dict()
    scheduler_config = vllm_config.scheduler_config
    scheduler_config.scheduler_cls = (
        ASYNC_SCHEDULER if scheduler_config.async_scheduling else SCHEDULER
    )
    return vllm_config


def _checked(raw: Any) -> EngineConfig:
    try:
        config = parse_engine_config(raw)
        for preset in config.known_presets().values():
            for variant in preset.variants():
                build(variant)
        classifier = task_classifier(config.task_classifier)
    except ValueError as error:
        raise StartupError(" ".join(str(error).split())) from None
    if isinstance(classifier, SequenceClassifier):
        seconds = classifier.seconds()
        log = logger.info if seconds < SLOW_CLASSIFIER_S else logger.warning
        log("kv-compress: task_classifier takes %.0f ms for a long prompt", 1e3 * seconds)
    return config


def _check_for_model(config: EngineConfig, vllm_config: VllmConfig) -> None:
    """Raise `StartupError` where a preset that was asked for does not suit the model's layers."""
    layers = vllm_config.model_config.get_total_num_hidden_layers()
    for preset in config.asked_presets().values():
        try:
            for variant in preset.variants():
                build(variant, layers)
        except ValueError as error:
            raise StartupError(" ".join(str(error).split())) from None
