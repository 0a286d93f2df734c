"""Tokens per second of an 8B shape in a cache of two uncompressed requests, and what they cost.

The bound is a sum over the steps that were really scheduled: the prompts' operations at the rate of
a matrix product; then for each step the held KVs, and for each that only decodes the weights, at
the bandwidth of a copy. All ceilings are measured in the same process.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

from vllm_kvcompress.bench.engine import Workload, scheduler_of, watched
from vllm_kvcompress.bench.flops import Decoder
from vllm_kvcompress.bench.gpu.ceilings import Ceilings
from vllm_kvcompress.bench.gpu.skipped import need_gpu
from vllm_kvcompress.bench.gpu.where import REHEARSAL

PLAIN = "plain"
OF_MODEL, OF_PREFILL = 0.85, 0.02
PAGE_TOKENS = 16


@dataclass(frozen=True)
class Scale:
    """few: how many of the prompts are enough to compare decoding alone."""

    decoder: Decoder
    prompts: int
    few: int
    prompt_tokens: int
    said: int
    long_prompt: int
    turns: int

    @property
    def cache_blocks(self) -> int:
        return 2 * -(-(self.prompt_tokens + self.said) // PAGE_TOKENS) + 1

    @property
    def weight_bytes(self) -> int:
        """Read by every step; the embedding is the head."""
        d = self.decoder
        per_layer = d.hidden * 2 * (d.heads + d.kv_heads) * d.head_size
        per_layer += 3 * d.hidden * d.intermediate
        return 2 * (d.layers * per_layer + d.vocabulary * d.hidden)

    @property
    def block_bytes(self) -> int:
        d = self.decoder
        return 2 * 2 * d.layers * d.kv_heads * d.head_size * PAGE_TOKENS

    @property
    def graphs(self) -> dict[str, Any]:
        sizes = [size for size in (1, 2, 4, 8, 12, 16, 24, 32) if size <= 2 * self.prompts]
        mode = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
        return {**mode, "cudagraph_capture_sizes": sizes}


EIGHT_B = Scale(
    Decoder(32, 4096, 14336, 32, 8, 128, 128_256),
    prompts=10,
    few=2,
    prompt_tokens=6144,
    said=500,
    long_prompt=8192,
    turns=5,
)
SMALL = Scale(
    Decoder(2, 64, 128, 4, 2, 16, 600),
    prompts=2,
    few=1,
    prompt_tokens=160,
    said=40,
    long_prompt=200,
    turns=1,
)


@dataclass
class Work:
    """A round that was run to its end."""

    seconds: float = 0.0
    tokens: int = 0
    prompt_tokens: int = 0
    held_bytes: int = 0  # summed over the steps
    decode_steps: int = 0

    def allowed_s(self, scale: Scale, ceilings: Ceilings) -> float:
        """Seconds at the ceilings."""
        prompts = self.prompt_tokens // scale.prompt_tokens
        operations = prompts * sum(scale.decoder.prefill(scale.prompt_tokens))
        moved = self.held_bytes + self.decode_steps * scale.weight_bytes
        return operations / ceilings.flops_s + moved / ceilings.bytes_s


def throughput(rate: int | str, scale: Scale = SMALL if REHEARSAL else EIGHT_B) -> dict[str, Any]:
    """Prompt and output tokens per second; `rate` "plain" is stock vLLM with FlashAttention."""
    need_gpu()
    ceilings = Ceilings.measure()
    settings = {"preset": "kv-compress-continual", "rate": rate}
    with opened(scale, None if rate == PLAIN else settings) as llm:
        once(llm, scale, prompts=2, said=32)  # compiles, also what compresses
        work = once(llm, scale, scale.prompts, seed=1)
        name = "plain vLLM" if rate == PLAIN else f"rate {rate}"
        per_s, allowed = work.tokens / work.seconds, work.allowed_s(scale, ceilings)
        share = allowed / work.seconds
        row: dict[str, Any] = {
            "what": f"{name}: {scale.prompts} prompts of {scale.prompt_tokens}, {scale.said} said",
            "found": f"{per_s:.0f} tokens/s, {share:.0%} of the bound",
            "bound": f"{work.tokens / allowed:.0f} tokens/s",
        }
        if rate == 8:
            row |= {"bound": f"{row['bound']}, >= {OF_MODEL:.0%} of it", "met": share >= OF_MODEL}
        rows, figures = [ceilings.row(), row], {"tokens_s": per_s}
        if rate == PLAIN:
            figures["few_tokens_s"] = rate_of_few(llm, scale, None)
        if rate == 8:
            figures["few_tokens_s"] = rate_of_few(llm, scale, "off")
            rows.append(compression(llm, scale))
    return {"rows": rows, **figures}


@contextmanager
def opened(scale: Scale, settings: dict[str, Any] | None) -> Iterator[Any]:
    """An engine without weights, in graphs."""
    from vllm import LLM

    longest = scale.long_prompt + PAGE_TOKENS
    with scale.decoder.folder(longest) as model:
        yield LLM(
            model=model,
            dtype="bfloat16",
            load_format="dummy",
            skip_tokenizer_init=True,
            block_size=PAGE_TOKENS,
            max_model_len=longest,
            max_num_batched_tokens=longest,
            max_num_seqs=2 * scale.prompts,
            num_gpu_blocks_override=scale.cache_blocks,
            enable_prefix_caching=False,
            compilation_config=scale.graphs,
            attention_backend="FLASH_ATTN",
            additional_config={"kv_compress": settings} if settings else {},
        )


def once(
    llm: Any,
    scale: Scale,
    prompts: int,
    seed: int = 0,
    preset: str | None = None,
    prompt_tokens: int | None = None,
    said: int | None = None,
) -> Work:
    """Ask them all at once and step until the last has been answered."""
    from vllm import SamplingParams

    asked = Workload(prompts, prompt_tokens or scale.prompt_tokens, said or scale.said, seed)
    params = SamplingParams(
        temperature=0,
        max_tokens=asked.output_tokens,
        ignore_eos=True,
        detokenize=False,
        extra_args={"kv_compress": preset} if preset else None,
    )
    words = asked.token_ids(scale.decoder.vocabulary)
    engine, pool = llm.llm_engine, scheduler_of(llm).kv_cache_manager.block_pool
    work = Work(prompt_tokens=asked.prompts * asked.prompt_tokens)
    work.tokens = work.prompt_tokens + asked.prompts * asked.output_tokens
    with watched(llm) as scheduled:
        began = time.perf_counter()
        llm.enqueue([{"prompt_token_ids": ids} for ids in words], params, use_tqdm=False)
        while engine.has_unfinished_requests():
            engine.step()
            held = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
            work.held_bytes += held * scale.block_bytes
        work.seconds = time.perf_counter() - began
    for step in scheduled:
        counts = step.num_scheduled_tokens
        work.decode_steps += bool(counts) and step.total_num_scheduled_tokens == len(counts)
    return work


def rate_of_few(llm: Any, scale: Scale, preset: str | None) -> float:
    works = [once(llm, scale, scale.few, seed, preset) for seed in range(2, 3 + scale.turns // 5)]
    return median(work.tokens / work.seconds for work in works)


def compression(llm: Any, scale: Scale) -> dict[str, Any]:
    """How much later the first token comes where a long prompt is compressed."""
    times: dict[str | None, list[float]] = {"off": [], None: []}
    for turn in range(scale.turns + 1):
        for preset, seconds in times.items():
            asked = once(llm, scale, 1, turn, preset, scale.long_prompt, said=2)
            seconds.append(asked.seconds)
    off, on = (median(seconds[1:]) for seconds in times.values())  # the first turn warms up
    return {
        "what": f"compressing a prompt of {scale.long_prompt}",
        "found": f"{on / off - 1:.1%} of {1e3 * off:.0f} ms",
        "bound": f"<= {OF_PREFILL:.0%}",
        "met": on / off - 1 <= OF_PREFILL,
    }
