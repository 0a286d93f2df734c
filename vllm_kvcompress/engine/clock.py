"""How long compressions take, by the clock of whoever does the work."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class HostClock:
    """Where the host does the work itself."""

    def __init__(self) -> None:
        self._seconds: list[float] = []

    @contextmanager
    def timed(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._seconds.append(time.perf_counter() - began)

    def take(self) -> list[float]:
        """Seconds of what was timed since the last call."""
        seconds, self._seconds = self._seconds, []
        return seconds


class CudaClock:
    """Where the host only launches: events in the stream, read once they have passed."""

    def __init__(self) -> None:
        self._running: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def timed(self) -> Iterator[None]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._running.append((begin, end))

    def take(self) -> list[float]:
        """Seconds of what has ended since the last call; what still runs comes with a later one."""
        seconds = []
        while self._running and self._running[0][1].query():
            begin, end = self._running.popleft()
            seconds.append(begin.elapsed_time(end) / 1e3)
        return seconds


def clock_of(device: torch.device) -> HostClock | CudaClock:
    return CudaClock() if device.type == "cuda" else HostClock()
