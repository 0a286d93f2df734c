"""What the device can do at most, by its own clock: copied bytes and multiplied matrices."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from vllm_kvcompress.bench.gpu.row import Row
from vllm_kvcompress.bench.gpu.where import DEVICE, REHEARSAL

COPY_BYTES = 1 << 20 if REHEARSAL else 4 << 30
MATRIX = 64 if REHEARSAL else 8192
WARM_UPS, RUNS = (1, 2) if REHEARSAL else (3, 20)
CACHE_BYTES = 1 << 16 if REHEARSAL else 256 << 20  # several times the largest L2
AHEAD_CYCLES = 2 << 20  # about a millisecond


def seconds(call: Callable[[], object]) -> float:
    """Median by the device's own clock, with nothing of its data in the L2 cache.

    The device is busy until the whole call is in its queue, so the host's launches do not count.
    What pushes the data out of L2 is read, not written, and leaves nothing to be written back.
    """
    for _ in range(WARM_UPS):
        call()
    others = torch.zeros(CACHE_BYTES // 4, device=DEVICE)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(RUNS)]
    for begin, end in events:
        torch.cuda._sleep(AHEAD_CYCLES)
        others.sum()
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return median(begin.elapsed_time(end) for begin, end in events) / 1e3


def host_seconds(call: Callable[[], object], runs: int = 3) -> float:
    """Median by the host's clock, of a call that ends when its work is done."""
    call()
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return median(times)


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

    def row(self) -> Row:
        return Row(
            "copy (bytes read + written), bf16 matrix product",
            f"{self.bytes_s / 1e9:.0f} GB/s, {self.flops_s / 1e12:.1f} TFLOP/s",
            figures={"copy_bytes_s": self.bytes_s, "product_flops_s": self.flops_s},
        )


def copy_bandwidth() -> float:
    """Bytes per second of a large copy, read and written."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / seconds(lambda: target.copy_(source))
