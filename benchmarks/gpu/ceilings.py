"""What the device can do at most, by its own clock: copied bytes and multiplied matrices."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from vllm_kvcompress.bench.gpu.where import DEVICE, REHEARSAL

COPY_BYTES = 1 << 20 if REHEARSAL else 4 << 30
MATRIX = 64 if REHEARSAL else 8192
RUNS = 2 if REHEARSAL else 20


def seconds(call: Callable[[], object], runs: int = RUNS) -> float:
    """Median by the device's own clock."""
    for _ in range(3):
        call()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    for begin, end in events:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return median(begin.elapsed_time(end) for begin, end in events) / 1e3


@dataclass(frozen=True)
class Ceilings:
    """bytes_s: of a large copy, read and written; flops_s: of a bf16 matrix product."""

    bytes_s: float
    flops_s: float

    @staticmethod
    def measure() -> "Ceilings":
        draw = torch.randn(2, MATRIX, MATRIX, device=DEVICE).bfloat16()
        product = seconds(lambda: torch.matmul(draw[0], draw[1]))
        return Ceilings(copy_bandwidth(), 2 * MATRIX**3 / product)

    def row(self) -> dict[str, str]:
        found = f"{self.bytes_s / 1e9:.0f} GB/s, {self.flops_s / 1e12:.1f} TFLOP/s"
        return {"what": "copy (read + written), bf16 matrix product", "found": found}


def copy_bandwidth() -> float:
    """Bytes per second of a large copy, read and written."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / seconds(lambda: target.copy_(source))
