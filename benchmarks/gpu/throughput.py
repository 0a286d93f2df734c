"""Tokens per second of an 8B shape in a cache of two uncompressed requests, and what they cost.

The bound of a round's seconds, whatever the engine, from the steps that were really scheduled:

    prompts * F / P  +  (sum over all steps of held blocks * block bytes
                         + steps that only decode * weight bytes) / C

with F operations of one prompt (multiply-adds counted twice, causal attention, the head for its
last token), P those of a bf16 matrix product per second, C the bytes of a copy per second, read and
written; both ceilings are measured in the same process. For the 8B shape at 6,144 tokens: F is
95.7e12, weights are 15.0 GB, a block of 16 tokens is 2 MiB.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from vllm_kvcompress.bench.engine import Workload, scheduler_of, watched
from vllm_kvcompress.bench.flops import Decoder
from vllm_kvcompress.bench.gpu import ttft
from vllm_kvcompress.bench.gpu.ceilings import Ceilings
from vllm_kvcompress.bench.gpu.engines import NO_AUTOTUNING
from vllm_kvcompress.bench.gpu.row import Row, on_speed
from vllm_kvcompress.bench.gpu.skipped import need_gpu
from vllm_kvcompress.bench.gpu.where import REHEARSAL

PRESET = "kv-compress-continual"
OF_MODEL, OF_PLAIN = 0.85, 0.97
RATE, OTHER_RATES = 8, (64, 1)  # in the order of their worth: rate 1 takes longest
PRESETS = (ttft.OFF, PRESET, "fastkv", "tsp")
PAGE_TOKENS = 16
Knobs = Mapping[str, Any]


@dataclass(frozen=True)
class Scale:
    """few: how many of the prompts are enough to compare decoding alone."""

    decoder: Decoder
    prompts: int
    few: int
    prompt_tokens: int
    said: int
    first_tokens: tuple[int, ...]
    turns: int

    @property
    def longest(self) -> int:
        return max(self.prompt_tokens + self.said, *self.first_tokens) + PAGE_TOKENS

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
        sizes = [size for size in (1, 2, 4, 8, 12, 16) if size <= 2 * self.prompts]
        mode = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
        return {**mode, "cudagraph_capture_sizes": sizes}


EIGHT_B = Scale(
    Decoder(32, 4096, 14336, 32, 8, 128, 128_256),
    prompts=10,
    few=2,
    prompt_tokens=6144,
    said=500,
    first_tokens=(4096, 8192),
    turns=5,
)
SMALL = Scale(
    Decoder(4, 64, 128, 4, 2, 16, 600),
    prompts=2,
    few=1,
    prompt_tokens=160,
    said=40,
    first_tokens=(96, 200),
    turns=1,
)
SCALE = SMALL if REHEARSAL else EIGHT_B


@dataclass
class Work:
    """A round that was run to its end."""

    seconds: float = 0.0
    tokens: int = 0
    prompt_tokens: int = 0
    held_bytes: int = 0  # summed over the steps
    decode_steps: int = 0

    @property
    def tokens_s(self) -> float:
        return self.tokens / self.seconds

    def allowed_s(self, scale: Scale, ceilings: Ceilings) -> float:
        """Seconds at the ceilings."""
        prompts = self.prompt_tokens // scale.prompt_tokens
        operations = prompts * sum(scale.decoder.prefill(scale.prompt_tokens))
        moved = self.held_bytes + self.decode_steps * scale.weight_bytes
        return operations / ceilings.flops_s + moved / ceilings.bytes_s


def plain(_: Mapping[str, float], scale: Scale = SCALE) -> Iterator[Row]:
    """Stock vLLM with FlashAttention."""
    need_gpu()
    ceilings = Ceilings.measure()
    yield ceilings.row()
    with opened(scale, None) as llm:
        once(llm, scale, prompts=2, said=32)  # compiles
        work = once(llm, scale, scale.prompts, seed=1)
        yield _row("plain vLLM", "plain", scale, work, ceilings)
        few = rate_of_few(llm, scale)
        found = f"{few:.0f} tokens/s"
        yield Row(f"plain vLLM, {_asked(scale, scale.few)}", found, figures={"plain_few": few})
        seconds = first_tokens(llm, scale, {ttft.PLAIN: {}})
        yield from ttft.report(scale.decoder, PAGE_TOKENS, seconds)


def compressed(figures: Mapping[str, float], scale: Scale = SCALE) -> Iterator[Row]:
    """One engine; its requests ask for their rate, for `off` and for selection of tokens.

    Args:
        figures: of `plain`; what is beside plain vLLM is left out without them.
    """
    need_gpu()
    ceilings = Ceilings.measure()
    yield ceilings.row()
    with opened(scale, {"preset": PRESET, "rate": RATE}) as llm:
        once(llm, scale, prompts=2, said=32)  # compiles, also what compresses
        yield _rate(llm, scale, RATE, ceilings, figures)
        few = rate_of_few(llm, scale, {"kv_compress": ttft.OFF})
        if "plain_few" in figures:
            share = few / figures["plain_few"]
            yield Row(
                f"{ttft.OFF}, {_asked(scale, scale.few)}",
                f"{few:.0f} tokens/s, {share:.2f} x plain vLLM",
                f">= {OF_PLAIN}",
                on_speed(share >= OF_PLAIN),
            )
        seconds = first_tokens(llm, scale, {name: {"kv_compress": name} for name in PRESETS})
        known = {n: figures.get(ttft.figure(n)) for n in scale.first_tokens}
        before = {n: s for n, s in known.items() if s is not None}
        yield from ttft.report(scale.decoder, PAGE_TOKENS, {ttft.PLAIN: before} | seconds)
        for rate in OTHER_RATES:
            yield _rate(llm, scale, rate, ceilings, figures)


def _rate(
    llm: Any, scale: Scale, rate: int, ceilings: Ceilings, figures: Mapping[str, float]
) -> Row:
    work = once(llm, scale, scale.prompts, seed=1, knobs={"kv_compress_rate": rate})
    row = _row(f"rate {rate}", f"rate_{rate}", scale, work, ceilings, figures.get("plain"))
    if rate != RATE:
        return row
    share = row.figures[f"rate_{rate}_of_ceilings"]
    return replace(row, bound=f">= {OF_MODEL:.0%}", met=on_speed(share >= OF_MODEL))


def _row(
    name: str,
    figure: str,
    scale: Scale,
    work: Work,
    ceilings: Ceilings,
    plain_tokens_s: float | None = None,
) -> Row:
    allowed = work.allowed_s(scale, ceilings)
    share = allowed / work.seconds
    found = f"{work.tokens_s:.0f} tokens/s"
    if plain_tokens_s is not None:
        found += f", {work.tokens_s / plain_tokens_s:.2f} x plain vLLM"
    return Row(
        f"{name}, {_asked(scale, scale.prompts)}",
        f"{found}, {share:.0%} of what the ceilings allow ({work.tokens / allowed:.0f} tokens/s)",
        figures={figure: work.tokens_s, f"{figure}_of_ceilings": share},
    )


def _asked(scale: Scale, prompts: int) -> str:
    return f"{prompts} x ({scale.prompt_tokens} read, {scale.said} written)"


@contextmanager
def opened(scale: Scale, settings: dict[str, Any] | None) -> Iterator[Any]:
    """An engine without weights, in graphs."""
    from vllm import LLM

    with scale.decoder.folder(scale.longest) as model:
        yield LLM(
            model=model,
            dtype="bfloat16",
            load_format="dummy",
            skip_tokenizer_init=True,
            block_size=PAGE_TOKENS,
            max_model_len=scale.longest,
            max_num_batched_tokens=scale.longest,
            max_num_seqs=2 * scale.prompts,
            num_gpu_blocks_override=scale.cache_blocks,
            enable_prefix_caching=False,
            compilation_config=scale.graphs,
            kernel_config=NO_AUTOTUNING,
            attention_backend="FLASH_ATTN",
            additional_config={"kv_compress": settings} if settings else {},
        )


def once(
    llm: Any,
    scale: Scale,
    prompts: int,
    seed: int = 0,
    knobs: Knobs | None = None,
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
        extra_args=dict(knobs) if knobs else None,
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


def rate_of_few(llm: Any, scale: Scale, knobs: Knobs | None = None) -> float:
    works = [once(llm, scale, scale.few, seed, knobs) for seed in range(2, 3 + scale.turns // 5)]
    return median(work.tokens_s for work in works)


def first_tokens(llm: Any, scale: Scale, asks: Mapping[str, Knobs]) -> dict[str, ttft.Seconds]:
    """Medians, by what requests ask for and the tokens of their prompts; taken turn by turn."""
    times: dict[tuple[str, int], list[float]] = {
        (name, n): [] for n in scale.first_tokens for name in asks
    }
    for turn in range(scale.turns + 1):
        for (name, n), seconds in times.items():
            seconds.append(once(llm, scale, 1, turn, asks[name], n, said=1).seconds)
    found: dict[str, ttft.Seconds] = {name: {} for name in asks}
    for (name, n), seconds in times.items():
        found[name][n] = median(seconds[1:])  # the first one warms up
    return found
