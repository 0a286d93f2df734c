"""What an attention engine is asked, and how it answers."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor


@dataclass(frozen=True, slots=True)
class HeadCall:
    """Causal attention of S sequences, each a (request, KV head) with its G query heads.

    queries, out: `[T, G, D]`, sequence by sequence; the newest token of a sequence comes last.
    keys, values: `[pages, B, 1, D]`, D contiguous (the `cpu` engine has its own packing).
    tables: int32 `[S, width]` pages; what stands behind a sequence's last page is not read.
    lengths: int32 `[S]` tokens, the queries' own among them; 0 for padding.
    query_start_loc: int32 `[S + 1]`.
    most_queries: the most query tokens of one sequence.
    longest: an upper bound of `lengths` that the host knows.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    tables: Tensor
    lengths: Tensor
    query_start_loc: Tensor
    most_queries: int
    longest: int
    scale: float
    softcap: float
    out: Tensor


FLOAT32 = ("float32", "float", "torch.float32")  # ways to ask for it


class AttentionEngine(ABC):
    """One way to compute a `HeadCall`.

    name: as in `attention_engine`.
    beside: vLLM's attention backends for everything that is not compressed, the best first.
    workspace_bytes: what it allocates once and keeps.
    attend_pages: what an engine made calls where `kernels.attend_pages` would do, and may be given
        instead; None where it has kernels of its own.
    """

    name: ClassVar[str]
    beside: ClassVar[tuple[str, ...]]
    workspace_bytes: ClassVar[int] = 0
    attend_pages: Callable[..., None] | None = None

    @classmethod
    @abstractmethod
    def obstacle(cls, platform: Any, dtype: str) -> str | None:
        """Why it cannot run here with a model of this dtype; None when it can."""

    @abstractmethod
    def attend(self, call: HeadCall) -> None:
        """Write `call.out`. Waits for nothing: it may be captured in a CUDA graph."""
