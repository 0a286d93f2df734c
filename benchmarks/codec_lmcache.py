"""LMCache's CacheGen codec, in an environment of its own: lmcache_process.py runs this file.

Answers requests, a line of JSON each, until its input ends. A request names an array (bf16 bits
`[layers, 2, tokens, channels]`, a .npy file), where to put what comes back, heads, tokens per chunk
and the bins of K and V of each layer; the answer has bytes and seconds. Imports nothing of this
project.
"""

import json
import sys
from importlib.metadata import version
from time import perf_counter
from typing import Any

import numpy as np
import torch
from lmcache.storage_backend.serde.cachegen_basics import (
    CacheGenConfig,
    CacheGenGPUEncoderOutput,
    QuantizationSpec,
)
from lmcache.storage_backend.serde.cachegen_decoder import decode_function_gpu, do_dequantize
from lmcache.storage_backend.serde.cachegen_encoder import encode_function


class Codec:
    """LMCache's serializer and deserializer without the objects around them."""

    def __init__(self, bins: list[list[int]]) -> None:
        """`bins` of K and of V by layer."""
        specs = [[QuantizationSpec(i, i + 1, b) for i, b in enumerate(part)] for part in bins]
        self.config = CacheGenConfig(len(bins[0]), *specs)
        self.bins = [torch.tensor(part, dtype=torch.float32) for part in bins]

    def encode(self, kv: torch.Tensor) -> bytes:
        """`[layers, 2, tokens, heads, head size]`."""
        return bytes(encode_function(kv, self.config, *self.bins, kv.shape[2]).to_bytes())

    def decode(self, data: bytes) -> torch.Tensor:
        """`[layers, 2, tokens, channels]`, bf16."""
        output = CacheGenGPUEncoderOutput.from_bytes(data)
        layers, tokens = output.max_tensors_key.shape[:2]
        buffer = torch.zeros(tokens, 2 * layers * output.cdf.shape[1], dtype=torch.uint8)
        key, value = decode_function_gpu(output.cdf, output.data_chunks, layers, tokens, buffer)
        key = do_dequantize(key, self.bins[0], output.max_tensors_key)
        value = do_dequantize(value, self.bins[1], output.max_tensors_value)
        return torch.stack([key, value], 1).to(torch.bfloat16)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    kv = torch.from_numpy(np.load(request["kv"]).view(np.int16)).view(torch.bfloat16)
    layers, _, tokens, channels = kv.shape
    heads, chunk = request["heads"], request["chunk_tokens"]
    by_head = kv.view(layers, 2, tokens, heads, channels // heads)
    parts = [by_head[:, :, start : start + chunk] for start in range(0, tokens, chunk)]
    codec = Codec(request["bins"])
    begun = perf_counter()
    data = [codec.encode(part) for part in parts]
    encoded = perf_counter()
    back = [codec.decode(d) for d in data]
    ended = perf_counter()
    whole = torch.cat(back, 2).contiguous().view(torch.int16).numpy().view(np.uint16)
    np.save(request["back"], whole)
    return {
        "version": version("lmcache"),
        "bytes": sum(map(len, data)),
        "encode_s": encoded - begun,
        "decode_s": ended - encoded,
    }


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
