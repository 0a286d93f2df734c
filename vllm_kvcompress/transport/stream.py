"""Which level to take of each chunk so that the first token comes in time. Pure arithmetic.

Level 0 is the chunk's text: recompute it. Levels count upwards in quality.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from vllm_kvcompress.transport.levels import LOSSLESS, RECOMPUTE

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
    worst_bytes_per_s: float | None = None  # of the transfers remembered
    decode_s: float = 0.0  # per chunk, at the same time as transfers
    undecoded: int = 0  # chunks that have arrived
    finish_s: float = 0.0  # from the last chunk to the first token

    def loading_s(self, level: int) -> float:
        """Until the first token, if all that remains comes at this level, as fast as now."""
        assert self.bytes_per_s
        transfer_s = sum(_at(sizes, level) for sizes in self.remaining) / self.bytes_per_s
        decoding_s = (self.undecoded + len(self.remaining)) * self.decode_s
        return max(transfer_s + self.decode_s, decoding_s) + self.finish_s

    def bad_case_s(self, level: int) -> float:
        """The same, if the next chunk comes at this level, all others at the lowest, and the line
        is from now on as slow as it has ever been."""
        worst = min(rate for rate in (self.bytes_per_s, self.worst_bytes_per_s) if rate)
        rest = sum(min(sizes.values()) for sizes in self.remaining[1:])
        transfer_s = (_at(self.remaining[0], level) + rest) / worst
        decoding_s = (self.undecoded + len(self.remaining)) * self.decode_s
        return max(transfer_s + self.decode_s, decoding_s) + self.finish_s

    def text_s(self) -> float:
        """The same, if all that remains is recomputed."""
        if self.recompute_s is None:
            return math.inf
        return len(self.remaining) * self.recompute_s + self.finish_s


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

    Two things are added. A level above the lowest is taken only if the target can still be met
    should the line become as slow as it was before: so the target is met whenever the lowest
    level throughout meets it. And the lossless level, where it fits, comes before the text: it is
    as exact, and leaves the processor to others.
    """

    ttft_s: float

    def choose(self, progress: Progress) -> int:
        sizes = progress.remaining[0]
        if progress.bytes_per_s is None:
            return _middle(sizes)
        left_s, lowest = self.ttft_s - progress.elapsed_s, min(sizes)
        fitting = (
            level
            for level in sorted(sizes, reverse=True)
            if progress.loading_s(level) <= left_s and progress.bad_case_s(level) <= left_s
        )
        best = next(fitting, None)
        if best != LOSSLESS and progress.text_s() <= left_s:
            return RECOMPUTE
        if best is None:
            return lowest if progress.loading_s(lowest) <= progress.text_s() else RECOMPUTE
        return best


RULES = {"carried_slack": CarriedSlack, "equal_shares": EqualShares}


def _middle(sizes: Sizes) -> int:
    levels = sorted(sizes)
    return levels[(len(levels) - 1) // 2]


def _at(sizes: Sizes, level: int) -> int:
    """Bytes at this level, or at the nearest stored one."""
    return sizes[min(sizes, key=lambda stored: (abs(stored - level), stored))]
