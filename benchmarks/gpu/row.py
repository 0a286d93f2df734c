"""What a section finds, row by row."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from vllm_kvcompress.bench.gpu.where import REHEARSAL


@dataclass(frozen=True)
class Row:
    """One thing that was looked at.

    bound: what `found` is held against.
    met: whether that holds; None where there is no verdict.
    figures: numbers by name, for later sections and for other programs.
    """

    what: str
    found: str
    bound: str | None = None
    met: bool | None = None
    figures: Mapping[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value not in (None, {})}


def on_speed(met: bool) -> bool | None:
    """The verdict; None where the GPU is only pretended."""
    return None if REHEARSAL else met
