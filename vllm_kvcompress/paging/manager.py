"""Scheduler side: which blocks a request holds before, at and after its compression.

    req_to_blocks   [ natural blocks ............ | arena, for one step ]
                      0 .. tail_start: null once freed
    Compression     the arena afterwards (two while a recompression is in flight)

The arena rides at the end of the step's new block ids, where the worker takes it off. From the
next step on it has a list of its own, so that positions in `req_to_blocks` keep their meaning.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.request import Request

from vllm_kvcompress.accounting import Plan
from vllm_kvcompress.paging.room import Room


@dataclass(slots=True)
class Arena:
    """The blocks that take the tokens kept at `point` computed tokens."""

    point: int
    blocks: list[KVCacheBlock]


@dataclass(slots=True)
class Compression:
    """Where one request stands in its plan.

    next_point: computed tokens at which the next arena is due, None after the last.
    window_tokens: queries before a stop of the plan that workers keep aside.
    arenas: newest last; the older ones are still read by steps in flight.
    in_transit: the newest arena is still at the end of `req_to_blocks`.
    settled: what the newest arena was copied from has been freed.
    propagated: the prompt's last chunk has been scheduled since it last started.
    """

    plan: Plan
    next_point: int | None
    window_tokens: int = 0
    arenas: list[Arena] = field(default_factory=list)
    in_transit: bool = False
    settled: bool = True
    propagated: bool = False

    def restart(self) -> None:
        """The request holds nothing any more; if it runs again, it begins at its first point."""
        self.arenas, self.in_transit, self.settled, self.propagated = [], False, True, False
        self.next_point = self.plan.first_point


class PerHeadManager(FullAttentionManager):
    """vLLM's full-attention manager, plus one `Plan` per request that says what to free when.

    Extends `vllm.v1.core.single_type_kv_cache_manager.FullAttentionManager`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._compressions: dict[str, Compression] = {}
        self._in_transit: list[str] = []
        self.freed_blocks = 0
        self.propagating = Room()  # prompt tokens on their way through the layers
        self.windows = Room()  # queries kept aside

    def set_plan(self, request_id: str, plan: Plan, window_tokens: int) -> None:
        """Say what will happen to the blocks of a request, before any is allocated."""
        if plan.first_point is not None or plan.tsp_tokens is not None:
            self._compressions[request_id] = Compression(plan, plan.first_point, window_tokens)

    def forget(self, request_id: str) -> None:
        """Drop the plan of a request that has ended and holds no blocks."""
        assert request_id not in self.req_to_blocks
        self._compressions.pop(request_id, None)

    def next_point(self, request_id: str) -> int | None:
        """Computed tokens at which the request's next arena is due."""
        compression = self._compressions.get(request_id)
        return compression.next_point if compression else None

    def is_compressing(self, request_id: str, processed_computed_tokens: int) -> bool:
        """Whether a step that compresses this request is still in flight."""
        compression = self._compressions.get(request_id)
        if compression is None or compression.settled:
            return False
        return compression.arenas[-1].point > processed_computed_tokens

    def has_room_to_propagate(self, request_id: str) -> bool:
        """Whether the hidden states of this prompt find room, or need none (any more)."""
        compression = self._compressions.get(request_id)
        if compression is None or compression.plan.tsp_tokens is None or compression.propagated:
            return True
        return self.propagating.fits(request_id, compression.plan.prompt_tokens)

    def tokens_with_room(self, request_id: str, computed_tokens: int, new_tokens: int) -> int:
        """How many of a step's `new_tokens` go on: those before a window that finds no room."""
        compression = self._compressions.get(request_id)
        stop = compression.plan.next_stop(computed_tokens) if compression else None
        if compression is None or stop is None:
            return new_tokens
        before = stop - compression.window_tokens - computed_tokens
        if new_tokens <= before or self.windows.fits(request_id, compression.window_tokens):
            return new_tokens
        return max(0, before)

    def arenas(self, request_id: str) -> list[Arena]:
        """The request's arenas, newest last."""
        compression = self._compressions.get(request_id)
        return list(compression.arenas) if compression else []

    def requests_compressing(self) -> list[str]:
        """Requests whose arena was allocated in this step."""
        return self._in_transit

    def new_step_starts(self) -> None:
        super().new_step_starts()
        for request_id in self._in_transit:
            compression = self._compressions[request_id]
            del self.req_to_blocks[request_id][-len(compression.arenas[-1].blocks) :]
            compression.in_transit = False
        self._in_transit.clear()
        self.propagating.new_step_starts()
        self.windows.new_step_starts()

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        *args: Any,
        apply_admission_cap: bool = False,
        **kwargs: Any,
    ) -> int:
        natural = super().get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            new_computed_blocks,
            *args,
            apply_admission_cap=apply_admission_cap,
            **kwargs,
        )
        compression = self._compressions.get(request_id)
        if compression is None or compression.next_point is None:
            return natural
        if not apply_admission_cap:
            due = num_tokens == compression.next_point
            return natural + compression.plan.arena_blocks if due else natural
        if num_tokens < compression.next_point:
            return natural
        evictable = self._get_num_evictable_blocks(new_computed_blocks)
        first = compression.plan.prompt_peak_blocks() - len(new_computed_blocks) + evictable
        peak = max(first, compression.plan.later_peak_blocks(num_tokens))
        return max(0, peak - self.blocks_held(request_id))  # what was loaded is held already

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        blocks = super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
        compression = self._compressions.get(request_id)
        if compression is not None:
            self._note_prompt(request_id, compression, num_tokens)
            self._note_window(request_id, compression, num_tokens)
        if compression is None or num_tokens != compression.next_point:
            return blocks
        arena = Arena(num_tokens, self.block_pool.get_new_blocks(compression.plan.arena_blocks))
        self.req_to_blocks[request_id].extend(arena.blocks)
        self._in_transit.append(request_id)
        compression.arenas.append(arena)
        compression.in_transit, compression.settled = True, False
        compression.next_point = compression.plan.next_point(num_tokens)
        return blocks + arena.blocks

    def _note_prompt(self, request_id: str, compression: Compression, num_tokens: int) -> None:
        """Count a prompt from its first chunk until the step after its last."""
        if compression.plan.tsp_tokens is None or compression.propagated:
            return
        self.propagating.enter(request_id, compression.plan.prompt_tokens)
        if num_tokens == compression.plan.prompt_tokens:
            compression.propagated = True
            self.propagating.leave_after_step(request_id)

    def _note_window(self, request_id: str, compression: Compression, num_tokens: int) -> None:
        """Count a window from its first query until the step after its last."""
        stop = compression.plan.next_stop(num_tokens - 1)
        if stop is None or num_tokens <= stop - compression.window_tokens:
            return
        self.windows.enter(request_id, compression.window_tokens)
        if num_tokens == stop:
            self.windows.leave_after_step(request_id)

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Free what the last compression copied from, once its step has been processed."""
        compression = self._compressions.get(request_id)
        if compression is None or compression.settled:
            return
        arena = compression.arenas[-1]
        if arena.point > processed_computed_tokens:
            return
        free_before = self.block_pool.get_num_free_blocks()
        for old in compression.arenas[:-1]:
            self.block_pool.free_blocks(reversed(old.blocks))
        tail_start = compression.plan.tail_start_block(arena.point)
        self._remove_blocks_in_range(request_id, 0, tail_start)
        compression.arenas, compression.settled = [arena], True
        self.freed_blocks += self.block_pool.get_num_free_blocks() - free_before

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Publish for prefix caching what the request's plan lets others use."""
        compression = self._compressions.get(request.request_id)
        limit = compression.plan.publish_limit_tokens() if compression else None
        if limit is not None:
            num_tokens = min(num_tokens, limit)
        super().cache_blocks(request, num_tokens, *args, **kwargs)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        blocks = super().pop_blocks_for_free(request_id)
        compression = self._compressions.get(request_id)
        if compression is None:
            return blocks
        for arena in self._arenas_apart(compression):
            blocks = blocks + arena.blocks
        if compression.in_transit:
            self._in_transit.remove(request_id)
        self.propagating.leave(request_id)
        self.windows.leave(request_id)
        compression.restart()
        return blocks

    def blocks_held(self, request_id: str) -> int:
        """Blocks this request holds right now, its arenas included, null blocks not."""
        held = sum(not block.is_null for block in self.req_to_blocks.get(request_id, []))
        compression = self._compressions.get(request_id)
        if compression is not None:
            held += sum(len(arena.blocks) for arena in self._arenas_apart(compression))
        return held

    def check_integrity(self) -> None:
        """Raise unless each block is free or held, no arena block held twice, and all have room.

        Raises:
            RuntimeError: with both sides of the equation that does not hold.
        """
        self.propagating.check_integrity()
        self.windows.check_integrity()
        pool = self.block_pool
        held = (block for block in pool.blocks if block.ref_cnt and not block.is_null)
        referenced = {block.block_id for block in held}
        free, total = pool.get_num_free_blocks(), pool.num_gpu_blocks - 1
        if free + len(referenced) != total:
            raise RuntimeError(f"{free} free + {len(referenced)} held blocks != {total} in all")
        ids = [block.block_id for blocks in self.req_to_blocks.values() for block in blocks]
        natural = set(ids) - {self._null_block.block_id}
        arenas = [
            block.block_id
            for compression in self._compressions.values()
            for arena in self._arenas_apart(compression)
            for block in arena.blocks
        ]
        if len(set(arenas)) != len(arenas) or natural & set(arenas):
            raise RuntimeError(
                f"{len(arenas)} arena blocks are {len(set(arenas))} blocks, of which "
                f"{len(natural & set(arenas))} are natural blocks too"
            )
        if stray := (natural | set(arenas)) - referenced:
            raise RuntimeError(f"{len(stray)} blocks are held by requests but free in the pool")

    @staticmethod
    def _arenas_apart(compression: Compression) -> list[Arena]:
        """The arenas that are not in `req_to_blocks`."""
        return compression.arenas[:-1] if compression.in_transit else compression.arenas


def manager_of(kv_cache_manager: Any) -> PerHeadManager:
    """The per-head manager inside a `KVCacheManager`.

    Raises:
        TypeError: the model's cache groups are not one group of per-head attention.
    """
    managers = kv_cache_manager.coordinator.single_type_managers
    if len(managers) != 1 or not isinstance(managers[0], PerHeadManager):
        kinds = ", ".join(type(manager).__name__ for manager in managers)
        raise TypeError(f"kv-compress needs one full-attention cache group, not: {kinds}")
    return managers[0]
