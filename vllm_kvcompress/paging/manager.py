"""Scheduler side: which blocks a request holds before, at and after its compression.

    req_to_blocks   [ natural blocks ............ | arena, for one step ]
                      0 .. tail_start: null once freed
    _arenas           the arena afterwards (two while a recompression is in flight)

The arena rides at the end of the step's new block ids, where the worker takes it off. From the
next step on it has a list of its own, so that positions in `req_to_blocks` keep their meaning.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.request import Request

from vllm_kvcompress.accounting import Plan


@dataclass(slots=True)
class Arena:
    """The blocks that take the tokens kept at `point` computed tokens."""

    point: int
    blocks: list[KVCacheBlock]


class PerHeadManager(FullAttentionManager):
    """vLLM's full-attention manager, plus one `Plan` per request that says what to free when.

    Extends `vllm.v1.core.single_type_kv_cache_manager.FullAttentionManager`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._plans: dict[str, Plan] = {}
        self._arenas: dict[str, list[Arena]] = {}
        self._in_transit: set[str] = set()
        self.freed_blocks = 0

    def set_plan(self, request_id: str, plan: Plan) -> None:
        """Say what will happen to the blocks of a request, before any is allocated."""
        if plan.first_point is not None:
            self._plans[request_id] = plan

    def requests_compressing(self) -> set[str]:
        """Requests whose arena was allocated in this step."""
        return self._in_transit

    def forget(self, request_id: str) -> None:
        """Drop the plan of a request that has ended and holds no blocks."""
        assert request_id not in self._arenas and request_id not in self.req_to_blocks
        self._plans.pop(request_id, None)

    def new_step_starts(self) -> None:
        super().new_step_starts()
        for request_id in self._in_transit:
            del self.req_to_blocks[request_id][-self._plans[request_id].arena_blocks :]
        self._in_transit.clear()

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
        plan = self._plans.get(request_id)
        if plan is None or plan.first_point is None or num_tokens < plan.first_point:
            return natural
        if apply_admission_cap:
            evictable = self._get_num_evictable_blocks(new_computed_blocks)
            first = plan.prompt_peak_blocks() - len(new_computed_blocks) + evictable
            return max(first, plan.later_peak_blocks(num_tokens))
        return natural + (plan.arena_blocks if self._arena_due(request_id, num_tokens) else 0)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        blocks = super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
        if not self._arena_due(request_id, num_tokens):
            return blocks
        arena = Arena(num_tokens, self.block_pool.get_new_blocks(self._arena_blocks(request_id)))
        self._arenas.setdefault(request_id, []).append(arena)
        self.req_to_blocks[request_id].extend(arena.blocks)
        self._in_transit.add(request_id)
        return blocks + arena.blocks

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Free what the last compression copied from, once its step has been processed."""
        super().remove_skipped_blocks(request_id, processed_computed_tokens, num_prompt_tokens)
        arenas = self._arenas.get(request_id)
        if not arenas or arenas[0].point > processed_computed_tokens:
            return
        free_before = self.block_pool.get_num_free_blocks()
        while len(arenas) > 1 and arenas[1].point <= processed_computed_tokens:
            self.block_pool.free_blocks(reversed(arenas.pop(0).blocks))
        tail_start = self._plans[request_id].tail_start_block(arenas[0].point)
        self._remove_blocks_in_range(request_id, 0, tail_start)
        self.freed_blocks += self.block_pool.get_num_free_blocks() - free_before

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Publish blocks for prefix caching, but none that saw a compressed context."""
        plan = self._plans.get(request.request_id)
        if plan is not None and plan.first_point is not None:
            num_tokens = min(num_tokens, plan.first_point)
        super().cache_blocks(request, num_tokens, *args, **kwargs)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        arenas = self._arenas.pop(request_id, [])
        if request_id in self._in_transit:
            self._in_transit.discard(request_id)
            arenas.pop()  # still at the end of req_to_blocks
        blocks = super().pop_blocks_for_free(request_id)
        return blocks + [block for arena in arenas for block in arena.blocks]

    def blocks_held(self, request_id: str) -> int:
        """Blocks this request holds right now, its arenas included, null blocks not."""
        natural = self.req_to_blocks.get(request_id, [])
        held = sum(not block.is_null for block in natural)
        arenas = self._arenas.get(request_id, [])
        if request_id in self._in_transit:
            arenas = arenas[:-1]
        return held + sum(len(arena.blocks) for arena in arenas)

    def check_integrity(self) -> None:
        """Raise unless every block is free or held, and no arena block is held twice.

        Raises:
            RuntimeError: with both sides of the equation that does not hold.
        """
        pool = self.block_pool
        referenced = {block.block_id for block in pool.blocks if block.ref_cnt and not block.is_null}
        free, total = pool.get_num_free_blocks(), pool.num_gpu_blocks - 1
        if free + len(referenced) != total:
            raise RuntimeError(f"{free} free + {len(referenced)} held blocks != {total} in all")
        arenas = [b.block_id for list_ in self._arenas.values() for a in list_ for b in a.blocks]
        natural = {
            block.block_id
            for request_id, blocks in self.req_to_blocks.items()
            for block in (blocks[: -self._arena_blocks(request_id)]
                          if request_id in self._in_transit else blocks)
            if not block.is_null
        }  # fmt: skip
        if len(set(arenas)) != len(arenas) or natural & set(arenas):
            twice = natural & set(arenas) or sorted(arenas)
            raise RuntimeError(f"{len(arenas)} arena blocks are not {len(arenas)} owned: {twice}")
        if stray := (natural | set(arenas)) - referenced:
            raise RuntimeError(f"{len(stray)} blocks are held by requests but free in the pool")

    def _arena_blocks(self, request_id: str) -> int:
        return self._plans[request_id].arena_blocks

    def _arena_due(self, request_id: str, num_tokens: int) -> bool:
        plan = self._plans.get(request_id)
        if plan is None or not plan.is_point(num_tokens):
            return False
        arenas = self._arenas.get(request_id)
        return not arenas or arenas[-1].point < num_tokens


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


