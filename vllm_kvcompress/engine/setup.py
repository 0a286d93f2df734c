"""The one place that turns `additional_config["kv_compress"]` into an engine configuration.

Chooses worker, scheduler, block size and runner, and refuses what is not supported, one line
each (`engine/refusals.py`), before any process starts.
"""

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import vllm
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_kvcompress.config import EngineConfig, StartupError, parse_engine_config
from vllm_kvcompress.engine.attention import choose
from vllm_kvcompress.engine.memory import with_window_capacity
from vllm_kvcompress.engine.propagation_limits import with_tsp_capacity
from vllm_kvcompress.engine.refusals import (
    AFTER,
    BEFORE,
    ON_DEVICE,
    WITH_CPU_ENGINE,
    refuse,
    refuse_platform,
    refuse_version,
)
from vllm_kvcompress.knobs import AUTO
from vllm_kvcompress.policy.registry import build
from vllm_kvcompress.policy.task_models import SequenceClassifier, task_classifier

CPU_BLOCK_TOKENS = 32
SLOW_CLASSIFIER_S = 0.05  # other requests wait meanwhile
CPU_WORKER = "vllm_kvcompress.engine.cpu.KVCompressCPUWorker"
DEVICE_WORKER = "vllm_kvcompress.engine.device_worker.KVCompressDeviceWorker"
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
    config = with_engine(config, engine_args, current_platform)
    engine_args.additional_config = {
        **engine_args.additional_config,
        "kv_compress": config.to_dict(),
    }
    on_device = config.attention_engine != "cpu"
    if not on_device:
        refuse(WITH_CPU_ENGINE, engine_args)
        os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
        if config.kernels != AUTO:
            raise StartupError(
                f"kernels={config.kernels} is for GPUs, and attention_engine=cpu uses none of "
                "them: leave it out"
            )
    engine_args.worker_cls = DEVICE_WORKER if on_device else CPU_WORKER
    if engine_args.block_size is None and current_platform.is_cpu():
        engine_args.block_size = CPU_BLOCK_TOKENS
    vllm_config = original(engine_args, *args, **kwargs)
    engine_args.worker_cls = "auto"
    refuse(AFTER, vllm_config)
    if on_device:
        refuse(ON_DEVICE, vllm_config)
        compilation = vllm_config.compilation_config
        # Triton compiles at a kernel's first call, which must not be the one that is captured.
        compilation.cudagraph_num_of_warmups = max(1, compilation.cudagraph_num_of_warmups)
    _check_for_model(config, vllm_config)
    config = with_window_capacity(with_tsp_capacity(config, vllm_config), vllm_config)
    vllm_config.additional_config["kv_compress"] = config.to_dict()
    scheduler_config = vllm_config.scheduler_config
    scheduler_config.scheduler_cls = (
        ASYNC_SCHEDULER if scheduler_config.async_scheduling else SCHEDULER
    )
    return vllm_config


def with_engine(config: EngineConfig, engine_args: Any, platform: Any) -> EngineConfig:
    """`config` with the name of an attention engine that runs here in the place of `auto`.

    On a GPU the attention of everything else is set to a backend the engine works beside.

    Raises:
        StartupError: the engine, or the backend asked for, cannot be used.
    """
    asked = engine_args.attention_backend or engine_args.attention_config.backend
    beside = None if platform.is_cpu() or not asked else getattr(asked, "name", asked).upper()
    # There vLLM looks for the version of FlashAttention that was asked for.
    so_far: Any = SimpleNamespace(attention_config=engine_args.attention_config, model_config=None)
    try:
        with set_current_vllm_config(so_far):
            engine = choose(config.attention_engine, platform, str(engine_args.dtype), beside)
    except ValueError as error:
        raise StartupError(str(error)) from None
    if not platform.is_cpu():
        name = beside or engine.beside[0]
        if name not in engine.beside:
            raise StartupError(
                f"attention_engine={engine.name} works beside {' or '.join(engine.beside)}, not "
                f"{name}: drop --attention-backend, or choose another attention_engine"
            )
        if engine_args.attention_config.backend is None:
            engine_args.attention_backend = AttentionBackendEnum[name]
        logger.warning(
            "kv-compress with attention_engine=%s has never run on a GPU: compare its answers "
            "before you rely on them (docs/gpu.md)",
            engine.name,
        )
    return config.model_copy(update={"attention_engine": engine.name})


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
