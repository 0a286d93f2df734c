"""What `kv_connector_extra_config` may say, or `cachegen` in `--kv-compress-config`."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_kvcompress.transport.levels import DEFAULT_LEVEL, Quantiser

STORE_VARIABLE = "KV_COMPRESS_STORE"
DEFAULT_MAX_GB = 20
MOST_TTFT_MS = 3_600_000
StoredLevel = Annotated[int, Field(ge=1, le=4)]


def default_store() -> str:
    """`KV_COMPRESS_STORE`, else a directory of this user's, with a cap."""
    if url := os.environ.get(STORE_VARIABLE):
        return url
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return f"file://{caches}/vllm-kvcompress?max_gb={DEFAULT_MAX_GB}"


class ConnectorSettings(BaseModel):
    """The connector's configuration; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    store: str = Field(default_factory=default_store)
    levels: Annotated[tuple[StoredLevel, ...], Field(min_length=1, max_length=4)] = (DEFAULT_LEVEL,)
    quantiser: Quantiser = Quantiser.FIXED
    profile: Path | None = None
    chunk_tokens: Annotated[int, Field(ge=16, le=8192)] = 256
    ttft_ms: Annotated[float, Field(gt=0, le=MOST_TTFT_MS)] | None = None
    rule: Literal["carried_slack", "equal_shares"] = "carried_slack"
    buffer_mb: Annotated[int, Field(ge=1, le=1 << 20)] = 512
    threads: Annotated[int, Field(ge=1, le=64)] = 1
    lookup_limit_s: Annotated[float, Field(gt=0, le=60)] = 1.0
    load_limit_s: Annotated[float, Field(gt=0, le=3600)] = 30.0

    @classmethod
    def of(cls, extra: Mapping[str, Any]) -> "ConnectorSettings":
        """Raises ValueError with one clear line."""
        try:
            return cls.model_validate(dict(extra))
        except ValidationError as error:
            what = error.errors()[0]
            name = ".".join(map(str, what["loc"])) or "?"
            raise ValueError(
                f"CacheGen's settings: {name}: {what['msg']} (known: {', '.join(cls.model_fields)})"
            ) from None
