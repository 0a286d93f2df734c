"""LMCache's CacheGen codec on one array, in an environment of its own: codec.py runs this file.

python codec_lmcache.py FOLDER '{"heads": 8, "chunk_tokens": 256, "rounds": 5}'

Reads FOLDER/kv.npy (bf16 bits `[layers, 2, tokens, channels]`), writes FOLDER/back.npy and, as the
last line, JSON: version, bytes, seconds. Imports nothing of this project.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from time import perf_counter

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

    def __init__(self, layers: int) -> None:
        """Its default schedule: 32 bins in the first 10 (K) and 2 (V) of ten or more layers."""
        k_fine, v_fine = (10, 2) if layers >= 10 else (layers, layers)
        specs = [
            [QuantizationSpec(0, fine, 32), QuantizationSpec(fine, layers, 16)]
            for fine in (k_fine, v_fine)
        ]
        self.config = CacheGenConfig(layers, *specs)
        self.bins = []
        for fine in (k_fine, v_fine):
            bins = torch.full((layers,), 16.0)
            bins[:fine] = 32
            self.bins.append(bins)

    def encode(self, kv: torch.Tensor) -> bytes:
        """`[layers, 2, tokens, heads, head size]`."""
        tokens = kv.shape[2]
        return bytes(encode_function(kv, self.config, *self.bins, tokens).to_bytes())

    def decode(self, data: bytes) -> torch.Tensor:
        """`[layers, 2, tokens, channels]`, bf16."""
        output = CacheGenGPUEncoderOutput.from_bytes(data)
        layers, tokens = output.max_tensors_key.shape[:2]
        buffer = torch.zeros(tokens, 2 * layers * output.cdf.shape[1], dtype=torch.uint8)
        key, value = decode_function_gpu(output.cdf, output.data_chunks, layers, tokens, buffer)
        key = do_dequantize(key, self.bins[0], output.max_tensors_key)
        value = do_dequantize(value, self.bins[1], output.max_tensors_value)
        return torch.stack([key, value], 1).to(torch.bfloat16)


def main() -> None:
    folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    kv = torch.from_numpy(np.load(folder / "kv.npy").view(np.int16)).view(torch.bfloat16)
    layers, _, tokens, channels = kv.shape
    heads, chunk = options["heads"], options["chunk_tokens"]
    by_head = kv.view(layers, 2, tokens, heads, channels // heads)
    parts = [by_head[:, :, start : start + chunk] for start in range(0, tokens, chunk)]
    codec = Codec(layers)
    encode_s, decode_s = [], []
    for i in range(options["rounds"] + 1):
        begun = perf_counter()
        data = [codec.encode(part) for part in parts]
        encoded = perf_counter()
        back = [codec.decode(d) for d in data]
        if i:  # the first compiles
            encode_s.append(encoded - begun)
            decode_s.append(perf_counter() - encoded)
    whole = torch.cat(back, 2).contiguous().view(torch.int16).numpy().view(np.uint16)
    np.save(folder / "back.npy", whole)
    said = {
        "version": version("lmcache"),
        "bytes": sum(map(len, data)),
        "encode_s": encode_s,
        "decode_s": decode_s,
    }
    print(json.dumps(said))


if __name__ == "__main__":
    main()
