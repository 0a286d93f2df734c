"""Which level to take of each chunk so that the first token comes in time. Pure arithmetic.

Level 0 is the chunk's text: recompute it. Levels count upwards in quality.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from vllm_kvcompress.transport.levels import RECOMPUTE

Sizes = Mapping[int, int]
"""Bytes of one chunk by level; only the levels that are stored."""


@dataclass(frozen=True)
class Progress:
    """What is known when the next chunk is chosen."""

    remaining: Sequence[Sizes]  # the next chunk first
    total_chunks: int
    elapsed_s: float
    bytes_per_s: float | None  # of the last transfer; None before the first
    recompute_s: float | None  # per chunk; None where recomputing is no choice


class StreamPolicy(Protocol):
    def choose(self, progress: Progress) -> int:
        """The level of the next chunk."""
        ...


@dataclass(frozen=True)
class FixedLevel:
    """The level that is asked for, or the nearest stored one below it, or above."""

    level: int

    def choose(self, progress: Progress) -> int:
        stored = sorted(progress.remaining[0])
        return max((s for s in stored if s <= self.level), default=stored[0])


@dataclass(frozen=True)
class EqualShares:
    """The rule of CacheGen's artifact: every chunk has an equal share of the time, and the best
    level that fits it is taken, else the text. Slack is not carried over."""

    ttft_s: float

    def choose(self, progress: Progress) -> int:
        sizes, rate = progress.remaining[0], progress.bytes_per_s
        if rate is None:
            return _middle(sizes)
        share = self.ttft_s / progress.total_chunks
        fitting = [level for level, size in sizes.items() if size / rate < share]
        if fitting:
            return max(fitting)
        return min(sizes) if progress.recompute_s is None else RECOMPUTE


@dataclass(frozen=True)
class CarriedSlack:
    """The paper's rule (arXiv 2310.07240, appendix C): the text if recomputing all that remains
    fits the remaining time; else the best level at which all that remains does; else the lowest,
    or the text where that is faster. The first chunk, its throughput unknown, gets a middle level.
    """

    ttft_s: float

    def choose(self, progress: Progress) -> int:
        sizes, rate = progress.remaining[0], progress.bytes_per_s
        if rate is None:
            return _middle(sizes)
        left_s, chunks = self.ttft_s - progress.elapsed_s, len(progress.remaining)
        recompute_s = progress.recompute_s
        if recompute_s is not None and chunks * recompute_s <= left_s:
            return RECOMPUTE
        for level in sorted(sizes, reverse=True):
            if sum(_at(other, level) for other in progress.remaining) / rate <= left_s:
                return level
        lowest = min(sizes)
        all_lowest_s = sum(_at(other, lowest) for other in progress.remaining) / rate
        if recompute_s is not None and chunks * recompute_s < all_lowest_s:
            return RECOMPUTE
        return lowest


RULES = {"carried_slack": CarriedSlack, "equal_shares": EqualShares}


def _middle(sizes: Sizes) -> int:
    levels = sorted(sizes)
    return levels[(len(levels) - 1) // 2]


def _at(sizes: Sizes, level: int) -> int:
    """Bytes at this level, or at the nearest stored one."""
    return sizes[min(sizes, key=lambda stored: (abs(stored - level), stored))]
