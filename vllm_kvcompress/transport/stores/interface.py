"""What every store can do. A key is `namespace/name`, each of `[a-z0-9_-]`."""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import StrEnum

KEY = re.compile(r"[a-z0-9_-]{1,64}/[a-z0-9_-]{1,128}")


class Reason(StrEnum):
    """Why a store did not do what it was asked."""

    DOWN = "down"
    SLOW = "slow"
    FULL = "full"
    DENIED = "denied"
    TOO_LARGE = "too_large"
    OTHER = "other"


class StoreError(RuntimeError):
    """A store's failure. `reason` is what it is counted under."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Store(ABC):
    """Bytes by key. Nothing is visible before it is whole. Thread-safe.

    Every method raises StoreError, and none waits beyond the limit that the store was opened with.
    """

    @abstractmethod
    def get(self, key: str, max_bytes: int) -> bytes | None:
        """The bytes, or None. StoreError(TOO_LARGE), before they are read, if there are more."""

    @abstractmethod
    def put(self, key: str, data: bytes) -> None:
        """Store under the key, over what may be there."""

    @abstractmethod
    def has(self, keys: Sequence[str]) -> list[bool]:
        """Which keys are there, in one round trip where the store can."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove the key if it is there."""

    def close(self) -> None:
        """Let go of connections."""
        return


def checked_key(key: str) -> str:
    """The key. Raises ValueError for one that a store could take for something else."""
    if not KEY.fullmatch(key):
        raise ValueError(f"store key {key!r}: must be namespace/name of [a-z0-9_-]")
    return key
