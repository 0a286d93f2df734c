"""CacheGen's codec on synthetic keys and values: the GPU's bytes beside the CPU's, and speeds."""

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from vllm_kvcompress.bench.gpu.ceilings import copy_bandwidth, host_seconds, seconds
from vllm_kvcompress.bench.gpu.row import Row
from vllm_kvcompress.bench.gpu.skipped import Skipped, need_gpu
from vllm_kvcompress.bench.gpu.where import DEVICE, REHEARSAL
from vllm_kvcompress.kernels.library import cuda_library

LAYERS, TOKENS, CHANNELS, HEADS = (1, 64, 64, 4) if REHEARSAL else (32, 256, 1024, 8)
DTYPE, LEVEL = "bfloat16", 1


def codec(_: Mapping[str, float]) -> Iterator[Row]:
    """GB/s of raw bf16; a chunk of 256 tokens of an 8B model at a time."""
    need_gpu()
    try:
        from vllm_kvcompress.transport.codec import CodecMissing, Encoded, SectionCodec
        from vllm_kvcompress.transport.cuda import CudaSectionCodec
        from vllm_kvcompress.transport.levels import plan
    except ImportError as error:
        raise Skipped(f"a package is missing: {error}") from None
    values, steps = chunk(), plan(LEVEL, LAYERS)
    raw = values.numel() * 2
    wanted: Encoded | None = None
    try:
        on_host, bits = SectionCodec(), values.view(torch.int16).numpy().view(np.uint16)
        wanted = on_host.encode(bits, DTYPE, steps, heads=HEADS)
        took = host_seconds(lambda: on_host.encode(bits, DTYPE, steps, heads=HEADS))
        yield Row(f"CPU, {on_host.isa}, 1 thread", f"{raw / took / 1e9:.2f} GB/s encoded")
    except CodecMissing as error:
        yield Row("CPU", f"not here: {error}")
    library = cuda_library()
    if library is None:
        yield Row("GPU", "not here: no CUDA kernels")
        return
    ours, there = CudaSectionCodec(library), values.view(torch.int16).to(DEVICE)
    coded, back = ours.encode(there, DTYPE, steps, heads=HEADS), torch.empty_like(there)
    if wanted is not None:
        same = coded.data.cpu().numpy().tobytes() == b"".join(wanted.sections)
        found = "the same bytes" if same else "other bytes"
        yield Row("what GPU and CPU write", found, "the same", same)
    encode = seconds(lambda: ours.encode(there, DTYPE, steps, heads=HEADS))
    decode = seconds(lambda: ours.decode(coded.data, coded.ends, coded.records, DTYPE, back))
    found = f"{raw / encode / 1e9:.1f} GB/s encoded, {raw / decode / 1e9:.1f} GB/s decoded"
    read = f"{copy_bandwidth() / 2e9:.0f} GB/s read by a copy"
    yield Row("GPU, its waits for the host included", found, read)


def chunk() -> Tensor:
    """bf16 `[layers * 2, tokens, channels]`: neighbours alike, channels of different width."""
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(2 * LAYERS, TOKENS, CHANNELS, generator=draw)
    for token in range(1, TOKENS):
        values[:, token] = 0.6 * values[:, token - 1] + 0.8 * values[:, token]
    width = torch.randn(2 * LAYERS, 1, CHANNELS, generator=draw).mul(0.5).exp()
    return (values * width).bfloat16()
