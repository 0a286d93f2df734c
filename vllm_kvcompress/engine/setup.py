"""The one place that turns `additional_config["kv_compress"]` into an engine configuration.

Chooses worker, scheduler, block size and runner, and refuses what is not supported, one line
each, before any process starts.
"""

import os
from collections.abc import Callable
from typing import Any

from vllm.config import VllmConfig
from vllm.platforms import current_platform

from vllm_kvcompress.config import EngineConfig, parse_engine_config
from vllm_kvcompress.policy.registry import build

CPU_BLOCK_TOKENS = 32
CPU_WORKER = "vllm_kvcompress.engine.cpu.KVCompressCPUWorker"
SCHEDULER = "vllm_kvcompress.engine.scheduler.KVCompressScheduler"
ASYNC_SCHEDULER = "vllm_kvcompress.engine.scheduler.KVCompressAsyncScheduler"


def configured(
    original: Callable[..., VllmConfig], engine_args: Any, *args: Any, **kwargs: Any
) -> VllmConfig:
    """`EngineArgs.create_engine_config` with compression on.

    Raises:
        ValueError: the setting is wrong, or the model or another feature is not supported.
    """
    config = parse_engine_config(engine_args.additional_config["kv_compress"])
    for preset in config.known_presets().values():
        build(preset)
    engine_args.additional_config = {
        **engine_args.additional_config,
        "kv_compress": config.to_dict(),
    }
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    engine_args.worker_cls = CPU_WORKER
    if engine_args.block_size is None and current_platform.is_cpu():
        engine_args.block_size = CPU_BLOCK_TOKENS
    vllm_config = original(engine_args, *args, **kwargs)
    scheduler_config = vllm_config.scheduler_config
    scheduler_config.scheduler_cls = (
        ASYNC_SCHEDULER if scheduler_config.async_scheduling else SCHEDULER
    )
    return vllm_config


__all__ = ["EngineConfig", "configured"]
