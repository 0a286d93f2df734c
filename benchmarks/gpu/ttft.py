"""Time to the first token with token-selective propagation, beside plain vLLM and its FLOPs."""

import gc
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch

from vllm_kvcompress.accounting import tsp_selected_tokens
from vllm_kvcompress.bench.engine import EngineSpec, Workload, open_engine, run
from vllm_kvcompress.bench.flops import Cost, Decoder, timed
from vllm_kvcompress.bench.gpu.skipped import need_gpu
from vllm_kvcompress.bench.gpu.where import REHEARSAL
from vllm_kvcompress.presets import shipped_presets

PLAIN = "plain vLLM"
PRESETS = ("tsp", "fastkv")
Seconds = dict[int, float]
"""Prompt tokens to seconds until the first token."""


@dataclass(frozen=True)
class Scale:
    """A model without weights, prompts, and how often each is timed."""

    decoder: Decoder
    lengths: tuple[int, ...]
    rounds: int
    dtype: str
    block_tokens: int

    def spec(self, model: str, kv_compress: Mapping[str, Any] | None) -> EngineSpec:
        longest = max(self.lengths) + self.block_tokens
        return EngineSpec(
            model,
            cache_blocks=2 * longest // self.block_tokens,
            kv_compress=kv_compress,
            max_model_len=longest,
            batched_tokens=min(longest, 8192),
            max_seqs=4,
            block_tokens=self.block_tokens,
            dtype=self.dtype,
            prefix_caching=False,
            load_format="dummy",
        )


# Half the layers of an 8B model.
ON_GPU = Scale(
    replace(Decoder.llama(16, 4096), intermediate=14336, heads=32, kv_heads=8, head_size=128),
    lengths=(4096, 16384),
    rounds=3,
    dtype="bfloat16",
    block_tokens=16,
)
SMALL = Scale(Decoder.llama(4, 64), lengths=(128, 256), rounds=1, dtype="float32", block_tokens=32)


def ttft(scale: Scale | None = None) -> dict[str, Any]:
    """Plain vLLM's first token and that of `tsp` and `fastkv`, all without graphs or compilation.

    Args:
        scale: `SMALL` runs anywhere; None is `ON_GPU`, which wants one.
    """
    if scale is None:
        need_gpu()
        scale = replace(SMALL, dtype=ON_GPU.dtype) if REHEARSAL else ON_GPU
    longest = scale.spec("", None).max_model_len
    with scale.decoder.folder(longest) as model:
        seconds = _first_tokens(scale, model, None, {PLAIN: {}})
        asks = {name: {"kv_compress": name} for name in (*PRESETS, "off")}
        seconds |= _first_tokens(scale, model, {"preset": PRESETS[0]}, asks)
    return report(scale, seconds)


def _first_tokens(
    scale: Scale,
    model: str,
    kv_compress: Mapping[str, Any] | None,
    asks: Mapping[str, Mapping[str, Any]],
) -> dict[str, Seconds]:
    """Medians of one engine, by what its requests ask for."""
    llm = open_engine(scale.spec(model, kv_compress))
    found: dict[str, Seconds] = {}
    for name, knobs in asks.items():
        found[name] = {}
        for n in scale.lengths:
            rounds = [
                run(llm, Workload(1, n, 1, seed, knobs)).wall_s for seed in range(scale.rounds + 1)
            ]
            found[name][n] = median(rounds[1:])  # the first one warms up
    del llm
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found


def report(scale: Scale, seconds: Mapping[str, Seconds]) -> dict[str, Any]:
    """Rows of plain vLLM's time over each one's own, and of its FLOPs over those left to do."""
    decoder, plain = scale.decoder, seconds[PLAIN]
    cost = timed({decoder.prefill(n): s for n, s in plain.items()})
    rows = []
    for name, own in seconds.items():
        for n, s in own.items():
            row = {"what": f"{name}, {n} tokens", "found": f"first token after {1e3 * s:.0f} ms"}
            if name != PLAIN:
                row["found"] += f", x plain {plain[n] / s:.2f}"
            if name in PRESETS:
                preset = shipped_presets()[name]
                selected = tsp_selected_tokens(n, scale.block_tokens, preset.settings())
                whole = decoder.prefill(n)
                part = decoder.prefill(n, selected, preset.last_full_layer(decoder.layers))
                row["bound"] = f"{Cost().of(whole) / Cost().of(part):.2f} by FLOPs"
                if cost is not None:
                    row["bound"] += f", {cost.of(whole) / cost.of(part):.2f} by timed FLOPs"
            rows.append(row)
    return {"rows": rows, "first_token_s": {name: dict(own) for name, own in seconds.items()}}
