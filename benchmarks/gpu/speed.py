"""Decode attention against the bytes that must move."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from vllm_kvcompress.bench.gpu.ceilings import copy_bandwidth, seconds
from vllm_kvcompress.bench.gpu.row import Row, on_speed
from vllm_kvcompress.bench.gpu.skipped import Skipped, need_gpu
from vllm_kvcompress.bench.gpu.where import DEVICE, REHEARSAL
from vllm_kvcompress.engine.attention.interface import AttentionEngine, HeadCall
from vllm_kvcompress.kernels import split_pages
from vllm_kvcompress.kernels.cuda import CudaPages
from vllm_kvcompress.kernels.library import cuda_library

OF_COPY, OF_FLASH = 0.85, 1.05
REQUESTS, HEADS, GROUP, SIZE, PAGE_TOKENS = (4, 2, 4, 64, 16) if REHEARSAL else (64, 8, 4, 128, 16)
LENGTHS = (48, 32) if REHEARSAL else (4096, 512)  # the first is the one with a bound
SEQUENCES = REQUESTS * HEADS
CUDA_KERNEL = "triton, CUDA kernel"


def decode_bandwidth(_: Mapping[str, float]) -> Iterator[Row]:
    """GB/s that decode attention reads, beside a measured copy's and FlashAttention's seconds.

    FlashInfer has a section of its own, since its kernel is built at the first call.
    """
    need_gpu()
    from vllm.platforms import current_platform

    from vllm_kvcompress.engine.attention import ENGINES, choose

    ours = choose("auto", current_platform, "bfloat16").name
    names = [name for name in ENGINES if name not in ("cpu", "flashinfer")]
    yield from _reads([*names, CUDA_KERNEL], ours)


def flashinfer_bandwidth(_: Mapping[str, float]) -> Iterator[Row]:
    """The same of the engine `flashinfer`."""
    need_gpu()
    from vllm.platforms import current_platform

    from vllm_kvcompress.engine.attention import load

    if reason := load("flashinfer").obstacle(current_platform, "bfloat16"):
        raise Skipped(reason)
    yield from _reads(["flashinfer"], None)


def _reads(names: Sequence[str], ours: str | None) -> Iterator[Row]:
    """`ours` is the engine that has to reach the bound."""
    copy = copy_bandwidth()
    yield Row("copy (bytes read + written)", f"{copy / 1e9:.0f} GB/s")
    for tokens in LENGTHS:
        call = head_call(tokens)
        held = 2 * call.keys.numel() * call.keys.element_size()
        plain = flash_attention_seconds(tokens)
        for name in names:
            what = f"{name}, {REQUESTS} requests of {tokens} tokens"
            try:
                engine = _engine(name)
                took = seconds(lambda e=engine, c=call: e.attend(c))  # type: ignore[misc]
            except Skipped as reason:
                yield Row(what, f"not here: {reason}")
                continue
            except Exception as error:  # one engine's failure is a finding, not the section's end
                yield Row(what, f"{type(error).__name__}: {error}"[:200], "that it runs", False)
                continue
            share = held / took / copy
            found = f"{held / took / 1e9:.0f} GB/s, {share:.0%} of the copy"
            bound, met = None, None
            if plain is not None:
                found += f", {took / plain:.2f} x FlashAttention's time for plain vLLM"
            if name == ours and tokens == LENGTHS[0]:
                bound = f">= {OF_COPY:.0%}" + (f", <= {OF_FLASH}" if plain is not None else "")
                fast = plain is None or took <= OF_FLASH * plain
                met = on_speed(share >= OF_COPY and fast)
            yield Row(what, found, bound, met)


def _engine(name: str) -> AttentionEngine:
    """Raises Skipped, saying why it cannot be here."""
    from vllm.platforms import current_platform

    from vllm_kvcompress.engine.attention import load

    engine = load("triton" if name == CUDA_KERNEL else name)
    if reason := engine.obstacle(current_platform, "bfloat16"):
        raise Skipped(reason)
    made = engine()
    if name == CUDA_KERNEL:
        if (library := cuda_library()) is None:
            raise Skipped("no CUDA kernels")
        made.attend_pages = CudaPages(library).attend_pages
    return made


def head_call(tokens: int) -> HeadCall:
    """One token of each request over shuffled pages, head by head."""
    pages = SEQUENCES * tokens // PAGE_TOKENS
    pool = torch.randn(pages, 1, PAGE_TOKENS, 2 * SIZE, device=DEVICE, dtype=torch.bfloat16)
    keys, values = split_pages(pool)
    queries = torch.randn(SEQUENCES, GROUP, SIZE, device=DEVICE, dtype=torch.bfloat16)
    return HeadCall(
        queries=queries,
        keys=keys,
        values=values,
        tables=torch.randperm(pages, device=DEVICE).to(torch.int32).view(SEQUENCES, -1),
        lengths=torch.full((SEQUENCES,), tokens, dtype=torch.int32, device=DEVICE),
        query_start_loc=torch.arange(SEQUENCES + 1, dtype=torch.int32, device=DEVICE),
        most_queries=1,
        longest=tokens,
        scale=SIZE**-0.5,
        softcap=0.0,
        out=torch.empty_like(queries),
    )


def flash_attention_seconds(tokens: int) -> float | None:
    """vLLM's FlashAttention on as many KVs as plain vLLM holds them; None where it is not."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends import fa_utils

    from vllm_kvcompress.engine.attention.flash_attn import FlashAttentionEngine

    if FlashAttentionEngine.obstacle(current_platform, "bfloat16"):
        return None
    blocks = REQUESTS * tokens // PAGE_TOKENS
    shape = (blocks, PAGE_TOKENS, HEADS, 2 * SIZE)
    keys, values = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16).split(SIZE, dim=-1)
    queries = torch.randn(REQUESTS, HEADS * GROUP, SIZE, device=DEVICE, dtype=torch.bfloat16)
    arguments: dict[str, Any] = {
        "q": queries,
        "k": keys,
        "v": values,
        "out": torch.empty_like(queries),
        "cu_seqlens_q": torch.arange(REQUESTS + 1, dtype=torch.int32, device=DEVICE),
        "max_seqlen_q": 1,
        "seqused_k": torch.full((REQUESTS,), tokens, dtype=torch.int32, device=DEVICE),
        "max_seqlen_k": tokens,
        "causal": True,
        "block_table": torch.randperm(blocks, device=DEVICE).to(torch.int32).view(REQUESTS, -1),
        "fa_version": fa_utils.get_flash_attn_version(head_size=SIZE),
    }
    return seconds(lambda: fa_utils.flash_attn_varlen_func(**arguments))
