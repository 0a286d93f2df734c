"""Where token-selective propagation works, and how many prompt tokens may be on their way."""

from typing import Any

from vllm.config import CompilationMode, VllmConfig

from vllm_kvcompress.config import EngineConfig, StartupError

# Decoders whose layers take (positions, hidden_states, residual) and may be given no residual.
ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)


def with_tsp_capacity(config: EngineConfig, vllm_config: VllmConfig) -> EngineConfig:
    """`config` with `tsp_max_inflight_tokens` filled in; 0 where there can be no TSP.

    Raises:
        StartupError: TSP was asked for and cannot be, or not with that many tokens.
    """
    longest = vllm_config.model_config.max_model_len
    tokens = config.tsp_max_inflight_tokens
    asking = sorted(name for name, preset in config.asked_presets().items() if preset.propagates)
    obstacle = _obstacle(vllm_config)
    if obstacle and (asking or tokens):
        who = f"preset {asking[0]!r}" if asking else f"tsp_max_inflight_tokens={tokens}"
        raise StartupError(
            f"token-selective propagation ({who}) does not work with {obstacle} yet; it does with "
            f"{', '.join(ARCHITECTURES)}: leave it out"
        )
    if asking and tokens == 0:
        raise StartupError(
            f"preset {asking[0]!r} needs room for hidden states: drop tsp_max_inflight_tokens=0"
        )
    if tokens and tokens < longest:
        raise StartupError(
            f"tsp_max_inflight_tokens={tokens} is less than one prompt may have: give at least "
            f"{longest}, the context length"
        )
    if tokens is None:
        tokens = 0 if obstacle else longest
    return config.model_copy(update={"tsp_max_inflight_tokens": tokens})


def _obstacle(vllm_config: VllmConfig) -> str | None:
    model_config: Any = vllm_config.model_config
    for architecture in model_config.architectures:
        if architecture not in ARCHITECTURES:
            return architecture
    if model_config.get_total_num_hidden_layers() < 2:
        return "a model of one layer"
    if vllm_config.compilation_config.mode == CompilationMode.STOCK_TORCH_COMPILE:
        return "compilation mode STOCK_TORCH_COMPILE"  # which cannot be passed by for a step
    return "LoRA adapters" if vllm_config.lora_config is not None else None
