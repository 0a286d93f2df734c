"""Work of threads beside the steps that compute: ordered behind them, and no step waits for it."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch


class Fence:
    """A point in the steps' work; on a CPU one that was reached at that `time.time()`."""

    def __init__(self, reached: float) -> None:
        self._reached = reached

    def wait(self) -> float:
        """Wait until it is reached, and say when that was."""
        return self._reached


class DeviceFence(Fence):
    """An event on a device."""

    def __init__(self, event: Any) -> None:
        self.event = event

    def wait(self) -> float:
        self.event.synchronize()
        return time.time()


class Beside:
    """On a CPU: everything is done when it is called for."""

    on_host = True

    def fence(self) -> Fence:
        """What the current step has asked for so far."""
        return Fence(time.time())

    @contextmanager
    def after(self, fence: Fence) -> Iterator[None]:
        """Do what is inside behind `fence`; it is done when this is left. Not inside a step."""
        yield

    def time(self, began: Fence, ended: Fence, tell: Callable[[float, float], None]) -> None:
        """Tell when both were reached, as soon as they are."""
        tell(began.wait(), ended.wait())


class BesideDevice(Beside):
    """On a GPU: a stream of its own for every thread.

    Args:
        streams: `torch.cuda`, or what has its streams and events.
    """

    on_host = False

    def __init__(self, device: torch.device, streams: Any = torch.cuda) -> None:
        self._device, self._streams = device, streams
        self._own = threading.local()
        self._watcher = ThreadPoolExecutor(1, "cachegen-watch")

    def fence(self) -> DeviceFence:
        return DeviceFence(self._record(self._streams.current_stream(self._device)))

    @contextmanager
    def after(self, fence: Fence) -> Iterator[None]:
        assert isinstance(fence, DeviceFence)
        if not hasattr(self._own, "stream"):
            self._own.stream = self._streams.Stream(self._device)
        stream = self._own.stream
        with torch.inference_mode(), self._streams.stream(stream):
            stream.wait_event(fence.event)
            try:
                yield
            finally:  # what was used in it may be freed and used again from here on
                self._record(stream).synchronize()

    def time(self, began: Fence, ended: Fence, tell: Callable[[float, float], None]) -> None:
        self._watcher.submit(lambda: tell(began.wait(), ended.wait()))

    def _record(self, stream: Any) -> Any:
        event = self._streams.Event(blocking=True)
        event.record(stream)
        return event


def beside(device: torch.device) -> Beside:
    """Where the pages are."""
    return Beside() if device.type == "cpu" else BesideDevice(device)
