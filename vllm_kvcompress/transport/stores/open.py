"""A store by its URL."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated
from urllib.parse import parse_qsl, urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_kvcompress.transport.stores.interface import Store
from vllm_kvcompress.transport.stores.throttle import ThrottledStore, stepped

OBJECT_SCHEMES = ("s3", "gs", "az", "memory")
KNOWN = "file:///folder, redis://host:port/db, rediss://..., s3://bucket/prefix, gs://..., az://..."
GIB = 1 << 30


class StoreOptions(BaseModel):
    """What may follow a store's URL after `?`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    ttl_s: Annotated[float, Field(gt=0, le=1e9)] | None = None
    timeout_s: Annotated[float, Field(gt=0, le=600)] = 5.0
    max_gb: Annotated[float, Field(gt=0, le=1e6)] | None = None
    gbps: Annotated[str, Field(pattern=r"^\d+(\.\d+)?(,\d+(\.\d+)?)*$", max_length=200)] | None = (
        None
    )
    step_mb: Annotated[float, Field(gt=0, le=1e6)] = 8

    def line(self) -> Callable[[int], float] | None:
        """How fast bytes pass: `gbps`, one rate after another for `step_mb` each; None: freely."""
        if self.gbps is None:
            return None
        rates = [float(rate) for rate in self.gbps.split(",")]
        if not min(rates) > 0:
            raise ValueError(f"gbps={self.gbps}: must be more than 0")
        return stepped(rates, int(self.step_mb * 1e6))


def open_store(url: str) -> Store:
    """The store at `url`: `file:///var/cache/kv?max_gb=50` (or `/var/cache/kv?max_gb=50`),
    `redis://host:6379/0?ttl_s=86400`, `s3://bucket/prefix`.

    Raises ValueError with one clear line; a store that is down is no error.
    """
    try:
        parts = urlsplit(f"file://{url}" if url.startswith("/") else url)
        _ = parts.port
    except ValueError as error:
        raise ValueError(f"store: {error}; known are {KNOWN}") from None
    if parts.username or parts.password:
        raise ValueError(
            "store: credentials do not belong in the URL; set REDIS_USERNAME and REDIS_PASSWORD, "
            "or the object store's own environment variables"
        )
    try:
        query = dict(parse_qsl(parts.query, strict_parsing=True)) if parts.query else {}
        options = StoreOptions.model_validate(query)
    except (ValidationError, ValueError) as error:
        what = error.errors()[0] if isinstance(error, ValidationError) else None
        detail = f"{'.'.join(map(str, what['loc']))}: {what['msg']}" if what else str(error)
        allowed = ", ".join(StoreOptions.model_fields)
        raise ValueError(f"store option {detail} (allowed: {allowed})") from None
    line = options.line()
    bare = parts._replace(query="").geturl()
    if options.max_gb is not None and parts.scheme != "file":
        raise ValueError("store option max_gb is for file:// only; other stores have their own cap")
    try:
        store = _open(parts.scheme, bare, options)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"store {bare}: {error}") from error
    return store if line is None else ThrottledStore(store, line)


def _open(scheme: str, url: str, options: StoreOptions) -> Store:
    parts = urlsplit(url)
    if scheme == "file":
        from vllm_kvcompress.transport.stores.local import LocalStore

        if parts.netloc or not parts.path.strip("/"):
            raise ValueError(f"store {url}: a folder is file:///absolute/path")
        cap = None if options.max_gb is None else int(options.max_gb * GIB)
        return LocalStore(Path(parts.path), cap, options.ttl_s)
    if scheme in ("redis", "rediss"):
        from vllm_kvcompress.transport.stores.redis_server import RedisStore

        db = parts.path.strip("/") or "0"
        if not parts.hostname or not db.isdigit():
            raise ValueError(f"store {url}: must be {scheme}://host:port/db")
        return RedisStore(
            parts.hostname,
            parts.port or 6379,
            int(db),
            tls=scheme == "rediss",
            ttl_s=options.ttl_s,
            timeout_s=options.timeout_s,
        )
    if scheme in OBJECT_SCHEMES:
        if scheme != "memory" and not parts.netloc:
            raise ValueError(f"store {url}: must be {scheme}://bucket/prefix")
        from vllm_kvcompress.transport.stores.objects import ObjectStore

        return ObjectStore(url, ttl_s=options.ttl_s, timeout_s=options.timeout_s)
    raise ValueError(f"store {url}: unknown kind; known are {KNOWN}")
