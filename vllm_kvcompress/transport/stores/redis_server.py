"""Chunks in Redis or Valkey."""

import os
from collections.abc import Sequence
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from vllm_kvcompress.transport.stores.interface import Reason, Store, StoreError, checked_key

PREFIX = "kvc:"


class RedisStore(Store):
    """One string per chunk. Size and eviction are the server's (`maxmemory`, `allkeys-lru`).

    `REDIS_USERNAME` and `REDIS_PASSWORD` are the credentials.
    """

    def __init__(
        self,
        host: str,
        port: int = 6379,
        db: int = 0,
        *,
        tls: bool = False,
        ttl_s: float | None = None,
        timeout_s: float = 5.0,
    ) -> None:
        self.ttl_ms = None if ttl_s is None else max(1, round(ttl_s * 1000))
        self._redis = redis.Redis(
            host=host,
            port=port,
            db=db,
            ssl=tls,
            username=os.environ.get("REDIS_USERNAME"),
            password=os.environ.get("REDIS_PASSWORD"),
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),
        )

    def get(self, key: str, max_bytes: int) -> bytes | None:
        name = PREFIX + checked_key(key)
        # One byte more than wanted tells "too large" without reading it all.
        data = self._ask(lambda: self._redis.getrange(name, 0, max_bytes))
        if len(data) > max_bytes:
            raise StoreError(Reason.TOO_LARGE, f"{key}: more than {max_bytes} bytes")
        return data or None

    def put(self, key: str, data: bytes) -> None:
        name = PREFIX + checked_key(key)
        self._ask(lambda: self._redis.set(name, data, px=self.ttl_ms))

    def has(self, keys: Sequence[str]) -> list[bool]:
        if not keys:
            return []
        pipeline = self._redis.pipeline(transaction=False)
        for key in keys:
            pipeline.exists(PREFIX + checked_key(key))
        return [bool(there) for there in self._ask(pipeline.execute)]

    def delete(self, key: str) -> None:
        self._ask(lambda: self._redis.delete(PREFIX + checked_key(key)))

    def close(self) -> None:
        self._redis.close()

    def _ask(self, command: Any) -> Any:
        try:
            return command()
        except redis.TimeoutError as error:
            raise StoreError(Reason.SLOW, str(error)) from error
        except (redis.AuthenticationError, redis.exceptions.NoPermissionError) as error:
            raise StoreError(Reason.DENIED, str(error)) from error
        except redis.ConnectionError as error:
            raise StoreError(Reason.DOWN, str(error)) from error
        except redis.RedisError as error:
            full = isinstance(error, redis.exceptions.OutOfMemoryError)
            raise StoreError(Reason.FULL if full else Reason.OTHER, str(error)) from error
