"""Decode attention against the bytes that must move."""

from typing import Any

import torch

from vllm_kvcompress.bench.gpu.ceilings import copy_bandwidth, seconds
from vllm_kvcompress.bench.gpu.skipped import need_gpu
from vllm_kvcompress.bench.gpu.where import DEVICE, REHEARSAL
from vllm_kvcompress.engine.attention.interface import HeadCall
from vllm_kvcompress.kernels import split_pages

OF_COPY, OF_FLASH = 0.85, 1.05
REQUESTS, HEADS, GROUP, SIZE, PAGE_TOKENS = (4, 2, 4, 64, 16) if REHEARSAL else (64, 8, 4, 128, 16)
LENGTHS = (32, 48) if REHEARSAL else (512, 4096)
SEQUENCES = REQUESTS * HEADS


def decode_bandwidth() -> dict[str, Any]:
    """GB/s that decode attention reads, beside a measured copy's and FlashAttention's seconds."""
    need_gpu()
    from vllm.platforms import current_platform

    from vllm_kvcompress.engine.attention import ENGINES, choose, load

    copy = copy_bandwidth()
    rows: list[dict[str, Any]] = [
        {"what": "copy, read + written", "found": f"{copy / 1e9:.0f} GB/s"}
    ]
    ours = choose("auto", current_platform, "bfloat16").name
    for tokens in LENGTHS:
        call = head_call(tokens)
        held = 2 * call.keys.numel() * call.keys.element_size()
        plain = flash_attention_seconds(tokens)
        for name in ENGINES:
            what = f"{name}, {tokens} tokens, {REQUESTS} requests"
            if reason := load(name).obstacle(current_platform, "bfloat16"):
                rows.append({"what": what, "found": f"not here: {reason}"})
                continue
            try:
                engine = load(name)()
                took = seconds(lambda e=engine, c=call: e.attend(c))
            except Exception as error:  # one engine's failure is a finding, not the section's end
                found = f"FAILED {type(error).__name__}: {error}"[:200]
                rows.append({"what": what, "found": found, "met": False})
                continue
            share = held / took / copy
            row: dict[str, Any] = {
                "what": what,
                "found": f"{held / took / 1e9:.0f} GB/s, {share:.0%} of the copy",
                "bound": f"{copy / 1e9:.0f} GB/s",
            }
            if plain is not None:
                row["found"] += f", {took / plain:.2f} of FlashAttention's time"
            if name == ours and tokens == LENGTHS[-1]:
                row["bound"] += f", >= {OF_COPY:.0%} of it, <= {OF_FLASH} of the time"
                row["met"] = share >= OF_COPY and (plain is None or took <= OF_FLASH * plain)
            rows.append(row)
    return {"rows": rows}


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
