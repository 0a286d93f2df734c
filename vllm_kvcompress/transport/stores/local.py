"""Chunks in a directory, shared by processes of one machine or of a network file system."""

import errno
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from vllm_kvcompress.transport.stores.interface import Reason, Store, StoreError, checked_key

SUFFIX, UNFINISHED = ".kvc", ".part"
KEEP_AFTER_EVICTION = 0.9  # of the cap, so that not every put evicts
FORGOTTEN_S = 3600  # an unfinished file this old has lost its writer


class LocalStore(Store):
    """A file per chunk, published by renaming; the least recently used go when the cap is passed.

    The modification time is when a chunk was written (for the TTL), the access time when it was
    last used (for the LRU), set explicitly, so mount options do not matter.
    """

    def __init__(
        self, root: Path, max_bytes: int | None = None, ttl_s: float | None = None
    ) -> None:
        self.root, self.max_bytes, self.ttl_s = root, max_bytes, ttl_s
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _as_store_error(error) from error
        self._evicting = threading.Lock()
        self._bytes = sum(size for _, size, _ in self._files())

    def get(self, key: str, max_bytes: int) -> bytes | None:
        path = self._path(key)
        try:
            with path.open("rb") as file:
                stat = os.fstat(file.fileno())
                if self._expired(stat.st_mtime):
                    path.unlink(missing_ok=True)
                    return None
                if stat.st_size > max_bytes:
                    message = f"{key}: {stat.st_size} bytes, not more than {max_bytes} wanted"
                    raise StoreError(Reason.TOO_LARGE, message)
                data = file.read(stat.st_size)
            os.utime(path, (time.time(), stat.st_mtime))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _as_store_error(error) from error
        return data

    def put(self, key: str, data: bytes) -> None:
        path = self._path(key)
        if self.max_bytes is not None and len(data) > self.max_bytes:
            raise StoreError(Reason.FULL, f"{len(data)} bytes, the store holds {self.max_bytes}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, unfinished = tempfile.mkstemp(UNFINISHED, dir=path.parent)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(data)
                os.replace(unfinished, path)
            except BaseException:
                Path(unfinished).unlink(missing_ok=True)
                raise
        except OSError as error:
            raise _as_store_error(error) from error
        self._bytes += len(data)
        if self.max_bytes is not None and self._bytes > self.max_bytes:
            self._evict()

    def has(self, keys: Sequence[str]) -> list[bool]:
        return [self._is_there(self._path(key)) for key in keys]

    def delete(self, key: str) -> None:
        try:
            self._path(key).unlink(missing_ok=True)
        except OSError as error:
            raise _as_store_error(error) from error

    def _path(self, key: str) -> Path:
        namespace, name = checked_key(key).split("/")
        return self.root / namespace / name[:2] / (name + SUFFIX)

    def _is_there(self, path: Path) -> bool:
        try:
            return not self._expired(path.stat().st_mtime)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise _as_store_error(error) from error

    def _expired(self, written: float) -> bool:
        return self.ttl_s is not None and time.time() - written > self.ttl_s

    def _files(self) -> list[tuple[float, int, Path]]:
        """(last used, bytes, path) of all chunks; files that lost their writer are removed."""
        found = []
        for path in self.root.glob(f"*/*/*[{SUFFIX}{UNFINISHED}]"):
            try:
                stat = path.stat()
                if path.suffix == SUFFIX:
                    found.append((stat.st_atime, stat.st_size, path))
                elif path.suffix == UNFINISHED and time.time() - stat.st_mtime > FORGOTTEN_S:
                    path.unlink()
            except OSError:
                continue  # another process was faster
        return found

    def _evict(self) -> None:
        """Bring the directory under its cap, whoever filled it."""
        assert self.max_bytes is not None
        with self._evicting:
            files = sorted(self._files())
            total = sum(size for _, size, _ in files)
            while files and total > self.max_bytes * KEEP_AFTER_EVICTION:
                _, size, path = files.pop(0)
                path.unlink(missing_ok=True)
                total -= size
            self._bytes = total


def _as_store_error(error: OSError) -> StoreError:
    reason = {
        errno.ENOSPC: Reason.FULL,
        errno.EDQUOT: Reason.FULL,
        errno.EACCES: Reason.DENIED,
        errno.EPERM: Reason.DENIED,
        errno.EROFS: Reason.DENIED,
    }.get(error.errno or 0, Reason.OTHER)
    return StoreError(reason, str(error))
