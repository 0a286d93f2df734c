"""A store behind a slow line, for tests and for looking at the streaming policy."""

import threading
import time
from collections.abc import Callable, Sequence

from vllm_kvcompress.transport.stores.interface import Store

REST_S = 1.0


def stepped(gbps: Sequence[float], step_bytes: int) -> Callable[[int], float]:
    """The first rate for so many bytes, then the next one; the last one stays."""
    return lambda moved: 1e9 * gbps[min(moved // step_bytes, len(gbps) - 1)]


class ThrottledStore(Store):
    """Lets bytes through at `bits_per_s(bytes already moved)`, one transfer at a time; after a
    second of rest the count begins anew."""

    def __init__(self, store: Store, bits_per_s: Callable[[int], float]) -> None:
        self._store, self._bits_per_s = store, bits_per_s
        self._line = threading.Lock()
        self.moved_bytes, self._moved_at = 0, time.monotonic()

    def get(self, key: str, max_bytes: int) -> bytes | None:
        data = self._store.get(key, max_bytes)
        if data is not None:
            self._pass(len(data))
        return data

    def put(self, key: str, data: bytes) -> None:
        self._pass(len(data))
        self._store.put(key, data)

    def has(self, keys: Sequence[str]) -> list[bool]:
        return self._store.has(keys)

    def delete(self, key: str) -> None:
        self._store.delete(key)

    def close(self) -> None:
        self._store.close()

    def _pass(self, size: int) -> None:
        with self._line:
            if time.monotonic() - self._moved_at > REST_S:
                self.moved_bytes = 0
            time.sleep(8 * size / self._bits_per_s(self.moved_bytes))
            self.moved_bytes += size
            self._moved_at = time.monotonic()
