"""CacheGen's codec on synthetic keys and values: the GPU's bytes beside the CPU's, and speeds."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_kvcompress.bench.gpu.ceilings import copy_bandwidth, seconds
from vllm_kvcompress.bench.gpu.skipped import Skipped
from vllm_kvcompress.bench.gpu.where import DEVICE, REHEARSAL
from vllm_kvcompress.kernels.library import cuda_library

LAYERS, TOKENS, CHANNELS, HEADS = (1, 64, 64, 4) if REHEARSAL else (32, 256, 1024, 8)
DTYPE, LEVEL = "bfloat16", 1


def codec() -> dict[str, Any]:
    """GB/s of raw bf16; a chunk of 256 tokens of an 8B model at a time."""
    try:
        from vllm_kvcompress.transport.codec import CodecMissing, Encoded, SectionCodec
        from vllm_kvcompress.transport.cuda import CudaSectionCodec
        from vllm_kvcompress.transport.levels import plan
    except ImportError as error:
        raise Skipped(f"a package is missing: {error}") from None
    values, steps = chunk(), plan(LEVEL, LAYERS)
    raw = values.numel() * 2
    rows: list[dict[str, Any]] = []
    wanted: Encoded | None = None
    try:
        on_host, bits = SectionCodec(), values.view(torch.int16).numpy().view(np.uint16)
        wanted = on_host.encode(bits, DTYPE, steps, heads=HEADS)
        took = seconds(lambda: on_host.encode(bits, DTYPE, steps, heads=HEADS), runs=3)
        found = f"{raw / took / 1e9:.2f} GB/s encoded"
        rows.append({"what": f"CPU, {on_host.isa}, 1 thread", "found": found})
    except CodecMissing as error:
        rows.append({"what": "CPU", "found": f"not here: {error}"})
    library = cuda_library()
    if library is None:
        return {"rows": [*rows, {"what": "GPU", "found": "not here: no CUDA kernels"}]}
    ours, there = CudaSectionCodec(library), values.view(torch.int16).to(DEVICE)
    coded, back = ours.encode(there, DTYPE, steps, heads=HEADS), torch.empty_like(there)
    encode = seconds(lambda: ours.encode(there, DTYPE, steps, heads=HEADS))
    decode = seconds(lambda: ours.decode(coded.data, coded.ends, coded.records, DTYPE, back))
    rows.append(
        {
            "what": "GPU",
            "found": f"{raw / encode / 1e9:.1f} / {raw / decode / 1e9:.1f} GB/s coded / decoded",
            "bound": f"{copy_bandwidth() / 2e9:.0f} GB/s read",
        }
    )
    if wanted is not None:
        same = coded.data.cpu().numpy().tobytes() == b"".join(wanted.sections)
        rows.append({"what": "the GPU's bytes are the CPU's", "found": str(same), "met": same})
        if not same:
            return {"state": "failed", "why": "the codecs' bytes differ", "rows": rows}
    return {"rows": rows}


def chunk() -> Tensor:
    """bf16 `[layers * 2, tokens, channels]`: neighbours alike, channels of different width."""
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(2 * LAYERS, TOKENS, CHANNELS, generator=draw)
    for token in range(1, TOKENS):
        values[:, token] = 0.6 * values[:, token - 1] + 0.8 * values[:, token]
    width = torch.randn(2 * LAYERS, 1, CHANNELS, generator=draw).mul(0.5).exp()
    return (values * width).bfloat16()
