"""Chunks in S3 and what speaks like it, Google Cloud Storage, Azure."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import TypeVar

import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import from_url

from vllm_kvcompress.transport.stores.interface import Reason, Store, StoreError, checked_key

T = TypeVar("T")
LOOKUPS_AT_ONCE = 16


class ObjectStore(Store):
    """One object per chunk; an object appears when it is whole, as these services promise.

    Credentials, region and endpoint come from the service's usual environment variables
    (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, ...). A TTL is checked when reading; let the bucket's
    own lifecycle rule remove what nobody reads.
    """

    def __init__(self, url: str, *, ttl_s: float | None = None, timeout_s: float = 5.0) -> None:
        limit = timedelta(seconds=timeout_s)
        http = {"allow_http": True} if url.startswith("s3://") else {}
        self._objects = from_url(
            url,
            client_options={"timeout": limit, "connect_timeout": limit, **http},
            retry_config={"max_retries": 1, "retry_timeout": limit},
        )
        self._ttl = None if ttl_s is None else timedelta(seconds=ttl_s)
        self._pool = ThreadPoolExecutor(LOOKUPS_AT_ONCE, "object-lookup")

    def get(self, key: str, max_bytes: int) -> bytes | None:
        path = checked_key(key)

        def read() -> bytes | None:
            found = obstore.get(self._objects, path)
            if self._expired(found.meta["last_modified"]):
                return None
            if found.meta["size"] > max_bytes:
                size = found.meta["size"]
                raise StoreError(Reason.TOO_LARGE, f"{key}: {size} bytes, {max_bytes} wanted")
            return bytes(found.bytes())

        return self._ask(read)

    def put(self, key: str, data: bytes) -> None:
        path = checked_key(key)
        self._ask(lambda: obstore.put(self._objects, path, data))

    def has(self, keys: Sequence[str]) -> list[bool]:
        return list(self._pool.map(self._is_there, [checked_key(key) for key in keys]))

    def delete(self, key: str) -> None:
        path = checked_key(key)
        self._ask(lambda: obstore.delete(self._objects, path))

    def close(self) -> None:
        self._pool.shutdown(wait=False)

    def _is_there(self, path: str) -> bool:
        meta = self._ask(lambda: obstore.head(self._objects, path))
        return meta is not None and not self._expired(meta["last_modified"])

    def _expired(self, written: datetime) -> bool:
        return self._ttl is not None and datetime.now(UTC) - written > self._ttl

    def _ask(self, command: Callable[[], T]) -> T | None:
        try:
            return command()
        except FileNotFoundError:
            return None
        except (PermissionDeniedError, UnauthenticatedError) as error:
            raise StoreError(Reason.DENIED, _first_line(error)) from error
        except (BaseError, OSError) as error:
            text = str(error).lower()
            slow = "timed out" in text or "timeout" in text
            down = "connect" in text or "dns" in text
            reason = Reason.SLOW if slow else Reason.DOWN if down else Reason.OTHER
            raise StoreError(reason, _first_line(error)) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300]
