"""What `kv_connector_extra_config` may say, and a request's own knobs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_kvcompress.transport.levels import DEFAULT_LEVEL, Quantiser

LEVEL_KNOB, TTFT_KNOB = "cachegen_level", "cachegen_ttft_ms"
StoredLevel = Annotated[int, Field(ge=1, le=4)]


class ConnectorSettings(BaseModel):
    """The connector's configuration; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    store: str
    levels: Annotated[tuple[StoredLevel, ...], Field(min_length=1, max_length=4)] = (DEFAULT_LEVEL,)
    quantiser: Quantiser = Quantiser.FIXED
    profile: Path | None = None
    chunk_tokens: Annotated[int, Field(ge=16, le=8192)] = 256
    ttft_ms: Annotated[float, Field(gt=0, le=3_600_000)] | None = None
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
                f"CacheGenConnector: kv_connector_extra_config {name}: {what['msg']}"
                f" (known: {', '.join(cls.model_fields)})"
            ) from None


class Knobs(NamedTuple):
    """What one request asks for."""

    level: int | None = None  # 0: neither load nor wait, recompute
    ttft_s: float | None = None


def knobs_of(extra_args: Mapping[str, Any] | None) -> Knobs:
    """A request's `cachegen_level` and `cachegen_ttft_ms`. Raises ValueError."""
    given = extra_args or {}
    level, ttft = given.get(LEVEL_KNOB), given.get(TTFT_KNOB)
    if level is not None and (isinstance(level, bool) or level not in range(5)):
        raise ValueError(f"{LEVEL_KNOB} {level!r}: must be 0 to 4")
    if ttft is None:
        return Knobs(None if level is None else int(level))
    if isinstance(ttft, bool) or not isinstance(ttft, int | float) or not 0 < ttft <= 3_600_000:
        raise ValueError(f"{TTFT_KNOB} {ttft!r}: must be more than 0, up to 3600000")
    return Knobs(None if level is None else int(level), ttft / 1000)
