"""Decode attention against the bytes that must move, and the codec's speed."""

from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from vllm_kvcompress.bench.gpu.skipped import Skipped, need_gpu

COPY_BYTES = 4 << 30
RUNS = 20
SEQUENCES, GROUP, SIZE, PAGE_TOKENS = 64 * 8, 4, 128, 16  # 64 requests, 8 KV heads


def seconds(call: Callable[[], object]) -> float:
    """Median by the device's own clock."""
    for _ in range(3):
        call()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(RUNS)]
    for begin, end in events:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return median(begin.elapsed_time(end) for begin, end in events) / 1e3


def copy_bandwidth() -> float:
    """Bytes per second of a large copy, read and written."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / seconds(lambda: target.copy_(source))


def decode_bandwidth() -> dict[str, Any]:
    """GB/s that decode attention reads, as a share of a measured copy's (read and written)."""
    need_gpu()
    from vllm.platforms import current_platform

    from vllm_kvcompress.engine.attention import ENGINES, HeadCall, load
    from vllm_kvcompress.kernels import split_pages

    copy = copy_bandwidth()
    rows = [{"what": "copy, read + written", "found": f"{copy / 1e9:.0f} GB/s"}]
    generator = torch.Generator(device="cuda").manual_seed(0)
    for tokens in (512, 4096):
        pages = SEQUENCES * tokens // PAGE_TOKENS
        pool = torch.randn(
            pages, 1, PAGE_TOKENS, 2 * SIZE, device="cuda", generator=generator
        ).bfloat16()
        keys, values = split_pages(pool)
        order = torch.randperm(pages, device="cuda", generator=generator)
        queries = torch.randn(SEQUENCES, GROUP, SIZE, device="cuda").bfloat16()
        call = HeadCall(
            queries=queries,
            keys=keys,
            values=values,
            tables=order.to(torch.int32).view(SEQUENCES, -1),
            lengths=torch.full((SEQUENCES,), tokens, dtype=torch.int32, device="cuda"),
            query_start_loc=torch.arange(SEQUENCES + 1, dtype=torch.int32, device="cuda"),
            most_queries=1,
            longest=tokens,
            scale=SIZE**-0.5,
            softcap=0.0,
            out=torch.empty_like(queries),
        )
        for name in ENGINES:
            what = f"{name}, {tokens} tokens in {SEQUENCES} heads"
            if reason := load(name).obstacle(current_platform, "bfloat16"):
                rows.append({"what": what, "found": f"not here: {reason}"})
                continue
            try:
                engine = load(name)()
                speed = pool.nbytes / seconds(lambda e=engine, c=call: e.attend(c))
            except Exception as error:  # one engine's failure is a finding, not the section's end
                rows.append(
                    {"what": what, "found": f"FAILED {type(error).__name__}: {error}"[:200]}
                )
                continue
            share = f"{speed / 1e9:.0f} GB/s, {speed / copy:.0%} of the copy"
            rows.append({"what": what, "found": share, "bound": f"{copy / 1e9:.0f} GB/s"})
        del pool, keys, values, call
    return {"rows": rows}


def codec() -> dict[str, Any]:
    """MB/s of the CPU codec on synthetic keys and values (there is no GPU codec)."""
    try:
        from vllm_kvcompress.bench.codec import Input, ours, synthetic
        from vllm_kvcompress.transport.codec import CodecMissing, instruction_sets
    except ImportError as error:
        raise Skipped(f"a package of the bench is missing: {error}") from None
    try:
        isa = instruction_sets()[-1]
    except CodecMissing:
        raise Skipped("the codec's extension is not built here") from None
    given = Input("synthetic", synthetic(4, 1024, 1024), 8)
    turns = [ours(given, 256, 1, isa, threads=1)() for _ in range(3)]
    encode = given.kv.nbytes / median(turn.encode_s for turn in turns) / 1e6
    decode = given.kv.nbytes / median(turn.decode_s for turn in turns) / 1e6
    what = f"encode / decode of raw bf16, {isa}, 1 thread"
    return {"rows": [{"what": what, "found": f"{encode:.0f} / {decode:.0f} MB/s"}]}
