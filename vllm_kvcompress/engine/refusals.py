"""What compression does not work with, refused at start-up in one line each.

A row is what was found, how to see it, and what to do. A row goes when its combination is built.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_kvcompress.config import STORE_CONNECTOR, StartupError, uses_store

SUPPORTED_VLLM = "0.32"
CACHE_DTYPES = ("auto", "float16", "bfloat16")
SINK_ARCHITECTURES = ("GptOssForCausalLM", "OpenAIPrivacyFilterForTokenClassification")
OTHER_MODEL = "serve a model with full attention in every layer, or leave compression out"


@dataclass(frozen=True, slots=True)
class Row:
    """`seen` returns what was found (shown where `what` has a place for it), or something false."""

    what: str
    seen: Callable[[Any], Any]
    remedy: str


# Asked with the `EngineArgs`, before vLLM builds its configuration.
BEFORE: Sequence[Row] = (
    Row(
        "a worker class of its own (--worker-cls {})",
        lambda args: args.worker_cls != "auto" and args.worker_cls,
        "compression brings its own worker: drop --worker-cls",
    ),
    Row(
        "a scheduler class of its own (--scheduler-cls {})",
        lambda args: args.scheduler_cls,
        "compression brings its own scheduler: drop --scheduler-cls",
    ),
    Row(
        "the Rust frontend (VLLM_USE_RUST_FRONTEND=1)",
        lambda args: os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"),
        "requests are checked in the Python one: unset VLLM_USE_RUST_FRONTEND",
    ),
)

# Asked with the `VllmConfig`.
AFTER: Sequence[Row] = (
    Row(
        "pooling models",
        lambda config: config.model_config.runner_type != "generate",
        "they keep no KV cache between steps: leave compression out",
    ),
    Row(
        "encoder-decoder models and cross-attention",
        lambda config: config.model_config.is_encoder_decoder,
        OTHER_MODEL,
    ),
    Row(
        "models without attention",
        lambda config: config.model_config.is_attention_free,
        OTHER_MODEL,
    ),
    Row(
        "hybrid models (attention beside state-space layers)",
        lambda config: config.model_config.is_hybrid,
        OTHER_MODEL,
    ),
    Row(
        "diffusion models",
        lambda config: config.model_config.is_diffusion,
        OTHER_MODEL,
    ),
    Row(
        "multi-head latent attention (MLA): its cache has no heads",
        lambda config: config.model_config.use_mla,
        OTHER_MODEL,
    ),
    Row(
        "attention sinks (extra learnt logits)",
        lambda config: _has_sinks(config.model_config),
        OTHER_MODEL,
    ),
    Row(
        "sliding-window or chunked attention ({})",
        lambda config: _local_attention(config.model_config),
        OTHER_MODEL,
    ),
    Row("ALiBi", lambda config: config.model_config.uses_alibi, OTHER_MODEL),
    Row(
        "layers that share their KV cache",
        lambda config: _text(config.model_config, "num_kv_shared_layers"),
        OTHER_MODEL,
    ),
    Row(
        "layers with different numbers of KV heads",
        lambda config: _uneven_heads(config.model_config),
        OTHER_MODEL,
    ),
    Row(
        "speculative decoding",
        lambda config: config.speculative_config is not None,
        "drop --speculative-config",
    ),
    Row(
        "a quantised KV cache (--kv-cache-dtype {})",
        lambda config: _other(config.cache_config.cache_dtype, CACHE_DTYPES),
        f"use one of: {', '.join(CACHE_DTYPES)}",
    ),
    Row(
        "--kv-sharing-fast-prefill",
        lambda config: config.cache_config.kv_sharing_fast_prefill,
        "drop it",
    ),
    Row(
        "prefix-cache hashes every {} tokens, which is not the block size",
        lambda config: _other(
            config.cache_config.prefix_match_unit, (None, config.cache_config.block_size)
        ),
        "drop --prefix-match-unit",
    ),
    Row(
        "other KV connectors ({})",
        lambda config: (
            config.kv_transfer_config is not None
            and not uses_store(config)
            and (config.kv_transfer_config.kv_connector or "--kv-transfer-config")
        ),
        f"use {STORE_CONNECTOR}, or drop --kv-transfer-config and --kv-offloading-size",
    ),
    Row(
        "decode context parallelism ({} ranks)",
        lambda config: _many(config.parallel_config.decode_context_parallel_size),
        "drop --decode-context-parallel-size",
    ),
    Row(
        "prefill context parallelism ({} ranks)",
        lambda config: _many(config.parallel_config.prefill_context_parallel_size),
        "drop --prefill-context-parallel-size",
    ),
    Row(
        "pipeline parallelism ({} ranks)",
        lambda config: _many(config.parallel_config.pipeline_parallel_size),
        "use --tensor-parallel-size instead",
    ),
)


def refuse_version(version: str) -> None:
    """Raise `StartupError` unless vLLM is 0.32.x."""
    if not version.startswith(f"{SUPPORTED_VLLM}."):
        raise StartupError(
            f"this vllm-kvcompress works with vLLM {SUPPORTED_VLLM}.x and found {version}: install "
            f"vllm=={SUPPORTED_VLLM}.*, or another vllm-kvcompress, or leave compression out"
        )


# Asked with the `EngineArgs` where the engine is `cpu`.
WITH_CPU_ENGINE: Sequence[Row] = (
    Row(
        "the V2 model runner (VLLM_USE_V2_MODEL_RUNNER=1)",
        lambda args: os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1",
        "unset VLLM_USE_V2_MODEL_RUNNER",
    ),
)

# Asked with the `VllmConfig` where the engine is not `cpu`.
ON_DEVICE: Sequence[Row] = (
    Row(
        "microbatches (two run at once, and page tables are for one)",
        lambda config: config.parallel_config.use_ubatching,
        "drop --enable-dbo and --ubatch-size",
    ),
    Row(
        "data-parallel ranks that come and go",
        lambda config: config.parallel_config.enable_elastic_ep,
        "drop --enable-elastic-ep",
    ),
)


def refuse_platform(platform: Any) -> None:
    """Raise `StartupError` on a platform that nothing is built for."""
    if not (platform.is_cpu() or platform.is_cuda()):
        raise StartupError(
            f"kv-compress runs on CPUs and, untried, on CUDA GPUs; "
            f"{platform.device_name.upper()} support is not built: leave compression out"
        )


def refuse(rows: Sequence[Row], config: Any) -> None:
    """Raise `StartupError` for the first row that is found in `config`."""
    for row in rows:
        if found := row.seen(config):
            raise StartupError(
                f"kv-compress does not work with {row.what.format(found)} yet: {row.remedy}"
            )


def _many(ranks: int) -> int:
    return ranks if ranks > 1 else 0


def _other(value: Any, allowed: Sequence[Any]) -> Any:
    return None if value in allowed else value


def _text(model_config: Any, name: str) -> Any:
    return getattr(model_config.hf_text_config, name, None)


def _local_attention(model_config: Any) -> str | None:
    if kinds := set(_text(model_config, "layer_types") or ()) - {"full_attention"}:
        return ", ".join(sorted(kinds))
    if chunk := _text(model_config, "attention_chunk_size"):
        return f"chunks of {chunk} tokens"
    window = model_config.get_sliding_window()
    return f"a window of {window} tokens" if window else None


def _has_sinks(model_config: Any) -> bool:
    flags = ("attention_sinks", "add_swa_attention_sink_bias", "add_full_attention_sink_bias")
    return any(_text(model_config, flag) for flag in flags) or any(
        architecture in SINK_ARCHITECTURES for architecture in model_config.architectures
    )


def _uneven_heads(model_config: Any) -> bool:
    heads = _text(model_config, "num_key_value_heads")
    blocks = _text(model_config, "block_configs") or _text(
        model_config, "num_key_value_heads_per_layer"
    )
    return bool(blocks) or (isinstance(heads, list) and len(set(heads)) > 1)
