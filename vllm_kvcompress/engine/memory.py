"""Memory that compressing takes beside the cache, at most: all bounds that a start-up can know.

windows        queries kept aside, `window_max_inflight_tokens` of them
propagation    hidden states of prompts on their way, and of one step that selects tokens
compression    one prompt as long as the context; one is compressed after another
positions      of kept tokens, while requests are compressed again: a share of the cache
"""

from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import VllmConfig

from vllm_kvcompress.config import EngineConfig, StartupError
from vllm_kvcompress.policy.ranking import AT_ONCE

WINDOW_BYTES = 512 << 20  # where nobody says how many queries are kept aside
SCORES = 6  # f32 tensors like the scores, alive at once while a request is compressed again
AT_ONCE_BYTES = 48  # inside a sort of f32, for each element that is sorted at once
STEP_STATES = 6  # of every token of a step that selects some: hidden, residual and copies
POSITION_BYTES = 4


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A model on one rank, as compression sees it."""

    layers: int
    heads: int  # for keys and values
    query_heads: int
    head_size: int
    hidden_size: int
    dtype: torch.dtype

    @staticmethod
    def of(vllm_config: VllmConfig) -> "ModelShape":
        model: Any = vllm_config.model_config
        parallel = vllm_config.parallel_config
        return ModelShape(
            layers=model.get_num_layers(parallel),
            heads=model.get_num_kv_heads(parallel),
            query_heads=model.get_num_attention_heads(parallel),
            head_size=model.get_head_size(),
            hidden_size=model.get_hidden_size(),
            dtype=model.dtype,
        )

    def window_bytes(self, tokens: int) -> int:
        """Queries of all layers."""
        return tokens * self.layers * self.query_heads * self.head_size * self.dtype.itemsize

    def state_bytes(self, tokens: int) -> int:
        """Hidden states."""
        return tokens * self.hidden_size * self.dtype.itemsize

    def compression_bytes(self, tokens: int) -> int:
        """What compressing a prompt of so many tokens takes, with any shipped preset.

        Either ranking its scores, or gathering the keys of a layer and reducing a head of them.
        """
        candidates = self.layers * self.heads * tokens
        keys = self.heads * tokens * self.head_size * self.dtype.itemsize
        one_head = 8 * tokens * self.head_size + 16 * self.query_heads * tokens
        at_once = min(candidates, max(AT_ONCE, self.heads * tokens))
        ranking = SCORES * 4 * candidates + AT_ONCE_BYTES * at_once
        return max(ranking, 4 * candidates + keys + one_head)

    def working_bytes(self, config: EngineConfig, vllm_config: VllmConfig) -> int:
        """Windows, and the larger of a compression and a step that selects tokens."""
        assert config.window_max_inflight_tokens is not None
        step_bytes = 0
        if config.tsp_max_inflight_tokens:
            step_tokens = vllm_config.scheduler_config.max_num_batched_tokens
            step_bytes = STEP_STATES * self.state_bytes(step_tokens)
        compression = self.compression_bytes(vllm_config.model_config.max_model_len)
        windows = self.window_bytes(config.window_max_inflight_tokens)
        return windows + max(step_bytes, compression)

    def positions_share(self) -> float:
        """Of memory for a cache and the positions of all its tokens, what the latter take."""
        page_bytes = 2 * self.head_size * self.dtype.itemsize
        return POSITION_BYTES / (POSITION_BYTES + page_bytes)


def with_window_capacity(config: EngineConfig, vllm_config: VllmConfig) -> EngineConfig:
    """`config` with `window_max_inflight_tokens` filled in.

    Raises:
        StartupError: the number that was asked for is less than one window.
    """
    windows = {
        variant.window_tokens: name
        for name, preset in config.known_presets().items()
        for variant in preset.variants()
    }
    longest, tokens = max(windows), config.window_max_inflight_tokens
    if tokens is not None and tokens < longest:
        raise StartupError(
            f"window_max_inflight_tokens={tokens} is less than one window may have: give at least "
            f"{longest}, as preset {windows[longest]!r} wants"
        )
    if tokens is None:
        most = longest * vllm_config.scheduler_config.max_num_seqs
        affordable = WINDOW_BYTES // ModelShape.of(vllm_config).window_bytes(1)
        tokens = max(longest, min(most, affordable))
    return config.model_copy(update={"window_max_inflight_tokens": tokens})
