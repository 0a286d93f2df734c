"""What is settled about the store before an engine starts: the connector's configuration, and
what it does not work with.
"""

from typing import Any

from vllm.config import KVTransferConfig
from vllm.platforms import current_platform

from vllm_kvcompress.config import STORE_CONNECTOR, StartupError, parse_engine_config, uses_store
from vllm_kvcompress.transport.codec import CodecMissing, instruction_sets
from vllm_kvcompress.transport.profile import Profile
from vllm_kvcompress.transport.settings import ConnectorSettings
from vllm_kvcompress.transport.stores import open_store

CONNECTOR_MODULE = "vllm_kvcompress.transport.connector"
CACHE_DTYPES = ("auto", "float16", "bfloat16")


def add_connector(engine_args: Any) -> None:
    """Make `kv_transfer_config` and `additional_config["kv_compress"]["cachegen"]` say the same.

    With neither, nothing changes. Raises StartupError where they differ, or make no sense.
    """
    given = engine_args.kv_transfer_config
    try:
        config = parse_engine_config(engine_args.additional_config["kv_compress"])
        if uses_store(engine_args):
            extra = dict(given.kv_connector_extra_config)
            if config.cachegen and config.cachegen != extra:
                raise ValueError("--kv-transfer-config and kv_compress name two stores: give one")
        elif config.cachegen is None:
            return
        else:
            extra = {"store": ConnectorSettings.of(config.cachegen).store, **config.cachegen}
    except ValueError as error:
        raise StartupError(" ".join(str(error).split())) from None
    engine_args.additional_config = {
        **engine_args.additional_config,
        "kv_compress": {**config.to_dict(), "cachegen": extra},
    }
    if given is None:
        engine_args.kv_transfer_config = KVTransferConfig(
            kv_connector=STORE_CONNECTOR,
            kv_connector_module_path=CONNECTOR_MODULE,
            kv_role="kv_both",
            kv_load_failure_policy="recompute",
            kv_connector_extra_config=extra,
        )


def check_connector(vllm_config: Any) -> None:
    """Raise StartupError for what would stop the connector in the engine's own process."""
    try:
        settings = ConnectorSettings.of(vllm_config.kv_transfer_config.kv_connector_extra_config)
        refuse(vllm_config, settings)
        instruction_sets()
        if settings.profile:
            Profile.load(settings.profile)
        open_store(settings.store).close()
    except (ValueError, OSError, CodecMissing) as error:
        raise StartupError(" ".join(str(error).split())) from None


def refuse(vllm_config: Any, settings: ConnectorSettings, kv_cache_config: Any = None) -> None:
    """Raise ValueError, one line, for what does not work."""
    block, parallel = vllm_config.cache_config.block_size, vllm_config.parallel_config
    refused = (
        (
            not (current_platform.is_cpu() or current_platform.is_cuda()),
            "it runs on CPUs and CUDA GPUs",
        ),
        (
            settings.chunk_tokens % block,
            f"chunk_tokens {settings.chunk_tokens} is not a multiple of the block size {block}",
        ),
        (vllm_config.model_config.use_mla, "multi-head latent attention is not supported"),
        (
            kv_cache_config is not None and len(kv_cache_config.kv_cache_groups) > 1,
            "models with several kinds of KV cache are not supported",
        ),
        (parallel.pipeline_parallel_size > 1, "pipeline parallelism is not supported"),
        (
            vllm_config.cache_config.cache_dtype not in CACHE_DTYPES,
            "a quantised KV cache is not supported",
        ),
    )
    for found, why in refused:
        if found:
            raise ValueError(f"{STORE_CONNECTOR}: {why}")
