"""Which of several equal kernels to call: the one that was fastest here, on such arguments."""

import time
from collections.abc import Callable, Hashable, Mapping
from statistics import median
from typing import Any

import torch

Kernel = Callable[..., None]

WARM_UPS, RUNS = 2, 5
AHEAD_CYCLES = 1 << 20  # about half a millisecond


class Fastest:
    """Calls the fastest of some kernels that do the same, by what `measure` found.

    Calls measure nothing, so they may stand in CUDA graphs; a kind that was not measured goes to
    the first kernel.

    Args:
        kernels: by name, the first being the one that takes everything. Another that raises a
            `RuntimeError` while it is measured is out for that kind.
        kind: what a call has in common with those that the same kernel suits best.
        seconds: how long one call takes; by default measured with the device's own clock.
    """

    def __init__(
        self,
        kernels: Mapping[str, Kernel],
        kind: Callable[..., Hashable],
        seconds: Callable[[Kernel, tuple[Any, ...]], float] | None = None,
    ) -> None:
        self._kernels = dict(kernels)
        self._kind = kind
        self._seconds = seconds or _median_seconds
        self._default = next(iter(self._kernels))
        self.measured: dict[Hashable, dict[str, float]] = {}

    def __call__(self, *args: Any) -> None:
        self._kernels[self.choice(*args)](*args)

    def choice(self, *args: Any) -> str:
        """The name of the kernel that a call with these arguments goes to."""
        times = self.measured.get(self._kind(*args))
        return min(times, key=times.__getitem__) if times else self._default

    def measure(self, *args: Any) -> None:
        """Call every kernel with these arguments some times, and remember how long it took."""
        times = {self._default: self._seconds(self._kernels[self._default], args)}
        for name, kernel in self._kernels.items():
            if name != self._default:
                try:
                    times[name] = self._seconds(kernel, args)
                except RuntimeError:
                    continue
        self.measured[self._kind(*args)] = times


def _median_seconds(kernel: Kernel, args: tuple[Any, ...]) -> float:
    for _ in range(WARM_UPS):
        kernel(*args)
    return median(_device_seconds(kernel, args) for _ in range(RUNS))


def _device_seconds(kernel: Kernel, args: tuple[Any, ...]) -> float:
    if not torch.cuda.is_available():
        began = time.perf_counter()
        kernel(*args)
        return time.perf_counter() - began
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(AHEAD_CYCLES)  # the launches are in the queue before the clock starts
    begin.record()
    kernel(*args)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
