"""What a prefill costs by its floating-point operations, and a model without weights to time."""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vllm_kvcompress.accounting import tsp_selected_tokens
from vllm_kvcompress.bench.engine import BLOCK_TOKENS, MODEL
from vllm_kvcompress.bench.variants import Variant
from vllm_kvcompress.presets import shipped_presets

DENSE_DECODERS = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


class Flops(NamedTuple):
    """Multiply-adds, counted twice."""

    linear: int  # projections, MLP, the head
    attention: int


@dataclass(frozen=True)
class Decoder:
    """The sizes of a dense decoder with a gated MLP."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int

    @staticmethod
    def of(config: Any) -> "Decoder | None":
        """From a transformers configuration; None where the count would be wrong."""
        if not set(config.architectures or ()) & set(DENSE_DECODERS):
            return None
        heads = config.num_attention_heads
        return Decoder(
            config.num_hidden_layers,
            config.hidden_size,
            config.intermediate_size,
            heads,
            config.num_key_value_heads,
            getattr(config, "head_dim", None) or config.hidden_size // heads,
            config.vocab_size,
        )

    @staticmethod
    def llama(layers: int, hidden: int) -> "Decoder":
        """A Llama with heads of 64, and the vocabulary of the demo model, as `folder` wants it.

        Raises:
            ValueError: `hidden` is no multiple of 64.
        """
        if hidden % 64:
            raise ValueError(f"a hidden size of {hidden} is no multiple of 64")
        heads = hidden // 64
        kv_heads = next(k for k in (4, 3, 2, 1) if heads % k == 0)
        vocabulary = json.loads((MODEL / "config.json").read_text())["vocab_size"]
        return Decoder(layers, hidden, hidden * 8 // 3 // 64 * 64, heads, kv_heads, 64, vocabulary)

    def prefill(self, n: int, selected: int | None = None, last_full: int = 0) -> Flops:
        """A prompt of n tokens up to its first token: causal attention, the head for one token.

        With `selected`, the layers above `last_full` see so many tokens.
        """
        counts = [n if selected is None or l <= last_full else selected for l in range(self.layers)]
        queries = self.heads * self.head_size
        per_token = self.hidden * (2 * queries + 2 * self.kv_heads * self.head_size)
        per_token += 3 * self.hidden * self.intermediate
        return Flops(
            2 * per_token * sum(counts) + 2 * self.hidden * self.vocabulary,
            4 * queries * sum(c * (c + 1) // 2 for c in counts),
        )

    @contextmanager
    def folder(self, longest: int) -> Iterator[str]:
        """A Llama of these sizes as a model folder for `--load-format dummy`."""
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_size,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": longest,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
        }
        with tempfile.TemporaryDirectory() as path:
            for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
                shutil.copy(MODEL / name, path)
            (Path(path) / "config.json").write_text(json.dumps(config))
            yield path


@dataclass(frozen=True)
class Cost:
    """What operations of each kind cost, in any unit."""

    linear: float = 1.0
    attention: float = 1.0

    def of(self, flops: Flops) -> float:
        return self.linear * flops.linear + self.attention * flops.attention


def timed(seconds: Mapping[Flops, float]) -> Cost | None:
    """Seconds per operation of each kind that explain measured prefills, relative errors least.

    Kernels reach different shares of a machine's peak, so counting all operations alike
    overrates the faster kind. None where the times do not tell the two apart.
    """
    if len(seconds) < 2:
        return None
    per_second = np.array([np.array(flops, float) / s for flops, s in seconds.items()])
    (linear, attention), *_ = np.linalg.lstsq(per_second, np.ones(len(seconds)), rcond=None)
    return Cost(float(linear), float(attention)) if min(linear, attention) > 0 else None


@dataclass(frozen=True)
class Prediction:
    """How much sooner the first token comes by the operations that are left to do.

    cost: what operations of each kind cost here, by plain vLLM's own times.
    """

    decoder: Decoder
    cost: Cost | None = None

    @staticmethod
    def of(decoder: Decoder, plain_s: Mapping[int, float]) -> "Prediction":
        """`plain_s`: plain vLLM's seconds by prompt tokens."""
        return Prediction(decoder, timed({decoder.prefill(n): s for n, s in plain_s.items()}))

    def speed_up(self, row: Variant, n: int) -> float:
        """Plain vLLM's operations over the row's, all counted alike."""
        return self._ratio(row, n, Cost())

    def timed_speed_up(self, row: Variant, n: int) -> float | None:
        """The same at the cost of each kind; None where that could not be told."""
        return None if self.cost is None else self._ratio(row, n, self.cost)

    def _ratio(self, row: Variant, n: int, cost: Cost) -> float:
        return cost.of(self.decoder.prefill(n)) / cost.of(self._flops(row, n))

    def _flops(self, row: Variant, n: int) -> Flops:
        if not propagates(row):
            return self.decoder.prefill(n)
        preset = shipped_presets()[str(row.preset)]
        selected = tsp_selected_tokens(n, BLOCK_TOKENS, preset.settings())
        return self.decoder.prefill(n, selected, preset.last_full_layer(self.decoder.layers))


def propagates(row: Variant) -> bool:
    """Whether the deep layers see selected tokens only."""
    return row.preset is not None and shipped_presets()[row.preset].propagates
