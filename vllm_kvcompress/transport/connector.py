"""CacheGen inside vLLM: `--kv-transfer-config '{"kv_connector": "CacheGenConnector",
"kv_connector_module_path": "vllm_kvcompress.transport.connector", "kv_role": "kv_both",
"kv_load_failure_policy": "recompute", "kv_connector_extra_config": {"store": "file:///..."}}'`

Extends `vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1`.
"""

import hashlib
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorRole,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

from vllm_kvcompress.paging.formats import page_format
from vllm_kvcompress.transport.beside import Fence
from vllm_kvcompress.transport.coders import coder
from vllm_kvcompress.transport.container import VERSION
from vllm_kvcompress.transport.jobs import Compute, Jobs, Load, Save
from vllm_kvcompress.transport.keys import chunk_digests, namespace, root_digest, store_key
from vllm_kvcompress.transport.knobs import Knobs, knobs_or_text
from vllm_kvcompress.transport.levels import RECOMPUTE
from vllm_kvcompress.transport.pages import CachePages
from vllm_kvcompress.transport.profile import Profile
from vllm_kvcompress.transport.settings import ConnectorSettings
from vllm_kvcompress.transport.setup import refuse
from vllm_kvcompress.transport.stats import CacheGenMetrics, CacheGenStats, Tally
from vllm_kvcompress.transport.stores import StoreError, open_store
from vllm_kvcompress.transport.transfers import Transfers

FLUSH_LIMIT_S = 10.0


@dataclass
class Tracked:
    """A live request, as the scheduler's side sees it."""

    request: Any
    space: str
    root: bytes
    digests: list[str]
    knobs: Knobs
    lookup: "Future[list[tuple[int, ...]]] | None" = None
    asked_at: float = 0.0
    tried: bool = False
    first_token: int = 0  # what vLLM found by itself before it asked us
    stored: list[tuple[int, ...]] = field(default_factory=list)
    saved_chunks: int = 0
    load: Load | None = None


class CacheGenConnector(KVConnectorBase_V1):
    """Prompts' KV caches to a store and back, in compressed chunks.

    Scheduler's side: names chunks, asks the store in a thread of its own, and tells vLLM how many
    tokens can be loaded. Worker's side: `Transfers`. A request is loaded for once; whatever goes
    wrong is a miss, and vLLM recomputes from there (`kv_load_failure_policy: recompute`).
    """

    @staticmethod
    def hit_limit(request: Any) -> int | None:
        """Tokens that may be loaded at most; a scheduler that compresses puts its own here."""
        return None

    @staticmethod
    def publish_limit(request: Any) -> int | None:
        """Tokens that may be saved at most, likewise."""
        return None

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        self.settings = ConnectorSettings.of(transfer.kv_connector_extra_config)
        refuse(vllm_config, self.settings, kv_cache_config)
        self.tally = Tally()
        self._profile = Profile.load(self.settings.profile) if self.settings.profile else None
        self._store = open_store(self.settings.store)
        self._ranks = vllm_config.parallel_config.tensor_parallel_size
        self._saves = transfer.is_kv_producer
        self._loads = transfer.is_kv_consumer
        self._block_tokens = vllm_config.cache_config.block_size
        self._tracked: dict[str, Tracked] = {}
        self._lookups = ThreadPoolExecutor(4, "cachegen-lookup")
        self._fingerprint = _fingerprint(vllm_config, self.settings, self._profile)
        self.transfers: Transfers | None = None
        self._step_began: Fence | None = None

    # Scheduler's side

    def on_new_request(self, request: Any) -> None:
        if request.request_id in self._tracked or not request.prompt_token_ids:
            return
        params = request.sampling_params
        knobs = knobs_or_text(params.extra_args if params else None)
        root = root_digest(self._fingerprint | _shaped_by(request))
        tracked = Tracked(
            request,
            namespace(request.cache_salt),
            root,
            chunk_digests(root, request.prompt_token_ids, self.settings.chunk_tokens),
            knobs,
        )
        self._tracked[request.request_id] = tracked
        if self._loads and tracked.digests and knobs.level != RECOMPUTE:
            tracked.asked_at = time.monotonic()
            tracked.lookup = self._lookups.submit(self._look_up, tracked)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        tracked = self._tracked.get(request.request_id)
        if tracked is None or tracked.lookup is None or tracked.tried:
            return 0, False
        if not tracked.lookup.done():
            if time.monotonic() - tracked.asked_at < self.settings.lookup_limit_s:
                return None, False
            tracked.tried = True
            self.tally.add("missed", len(tracked.digests), label="lookup_too_slow")
            return 0, False
        tracked.stored = tracked.lookup.result()
        limit = self.hit_limit(request)
        most = request.num_prompt_tokens - 1 if limit is None else limit
        stored = len(tracked.stored) * self.settings.chunk_tokens
        tracked.first_token = num_computed_tokens
        # Of the last chunk, whole blocks are used.
        found = min(stored, most // self._block_tokens * self._block_tokens) - num_computed_tokens
        return (found, True) if found > 0 else (0, False)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        tracked = self._tracked.get(request.request_id)
        if tracked is None or num_external_tokens <= 0:
            return
        tracked.tried = True
        self.tally.add("hit_tokens", num_external_tokens)
        chunk = self.settings.chunk_tokens
        (block_ids,) = blocks.get_block_ids()
        last = tracked.first_token + num_external_tokens
        first_chunk, last_chunk = tracked.first_token // chunk, -(-last // chunk)
        tracked.load = Load(
            request_id=request.request_id,
            space=tracked.space,
            first_chunk=first_chunk,
            digests=tracked.digests[first_chunk:last_chunk],
            levels=tracked.stored[first_chunk:last_chunk],
            first_token=tracked.first_token,
            block_ids=list(block_ids[: last // self._block_tokens]),
            prompt_tokens=request.num_prompt_tokens,
            arrived=request.arrival_time,
            level=tracked.knobs.level,
            ttft_s=tracked.knobs.ttft_s or (self.settings.ttft_ms or 0) / 1000 or None,
        )

    def build_connector_meta(self, scheduler_output: Any) -> Jobs:
        jobs = Jobs()
        for tracked in self._tracked.values():
            if tracked.load is not None:
                jobs.loads.append(tracked.load)
                tracked.load = None
        for request_id, tokens in scheduler_output.num_scheduled_tokens.items():
            tracked = self._tracked.get(request_id)
            if tracked is None:
                continue
            first, prompt = tracked.request.num_computed_tokens, tracked.request.num_prompt_tokens
            if first < prompt:
                last = min(first + tokens, prompt)
                jobs.computes.append(Compute(request_id, first, last, prompt))
            if self._saves:
                jobs.saves += self._new_chunks(request_id, tracked, tokens)
        return jobs

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        tracked = self._tracked.pop(request.request_id, None)
        if tracked is not None and tracked.lookup is not None:
            tracked.lookup.cancel()
        return False, None

    def _look_up(self, tracked: Tracked) -> list[tuple[int, ...]]:
        """Levels stored of each chunk, of all ranks, up to the first chunk that has none."""
        digests = tracked.digests
        keys = [
            store_key(tracked.space, digest, rank, self._ranks, level)
            for digest in digests
            for level in self.settings.levels
            for rank in range(self._ranks)
        ]
        try:
            there = iter(self._store.has(keys))
        except StoreError as error:
            self.tally.add("missed", len(digests), label=f"store_{error.reason}")
            return []
        found = []
        for _ in digests:
            by_level = {
                level: all([next(there) for _ in range(self._ranks)])
                for level in self.settings.levels
            }
            found.append(tuple(level for level, is_there in by_level.items() if is_there))
        stop = next((i for i, levels in enumerate(found) if not levels), len(found))
        if stop < len(found):
            self.tally.add("missed", len(found) - stop, label="not_stored")
        return found[:stop]

    def _new_chunks(self, request_id: str, tracked: Tracked, tokens: int) -> list[Save]:
        """Chunks that are whole after this step and not in the store; of the answer too, which
        the next turn of a conversation brings back."""
        chunk, block = self.settings.chunk_tokens, self._block_tokens
        computed = tracked.request.num_computed_tokens + tokens
        limit = self.publish_limit(tracked.request)
        if limit is not None:
            computed = min(computed, limit)
        whole = min(computed, tracked.request.num_tokens) // chunk
        if whole <= tracked.saved_chunks:
            return []
        if whole > len(tracked.digests):
            known = tracked.request.all_token_ids[: whole * chunk]
            tracked.digests = chunk_digests(tracked.root, known, chunk)
        assert self._kv_cache_manager is not None
        (block_ids,) = self._kv_cache_manager.get_block_ids(request_id)
        saves = [
            Save(
                tracked.space,
                tracked.digests[i],
                list(block_ids[i * chunk // block : (i + 1) * chunk // block]),
            )
            for i in range(tracked.saved_chunks, whole)
            if i >= len(tracked.stored) or set(tracked.stored[i]) != set(self.settings.levels)
        ]
        tracked.saved_chunks = whole
        return saves

    # Worker's side

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        names = sorted(kv_caches, key=_layer_number)
        layers = self._vllm_config.compilation_config.static_forward_context
        caches = [kv_caches[name] for name in names]
        pages = CachePages(caches, partial(page_format, layers[names[0]], caches[0]))
        self.transfers = Transfers(
            self.settings,
            self._store,
            coder(self.settings, self._profile, pages),
            self.tally,
            rank=get_tensor_model_parallel_rank(),
            ranks=self._ranks,
            may_recompute=self._kv_transfer_config.kv_load_failure_policy == "recompute",
        )

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        assert self.transfers is not None
        super().bind_connector_metadata(connector_metadata)
        if connector_metadata.computes:
            self._step_began = self.transfers.coder.beside.fence()

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        assert self.transfers is not None
        for load in self._get_connector_metadata().loads:
            self.transfers.load(load)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are whole before their request is scheduled."""

    def save_kv_layer(self, *args: Any, **kwargs: Any) -> None:
        """Chunks are saved whole, after the step."""

    def wait_for_save(self) -> None:
        assert self.transfers is not None
        jobs = self._get_connector_metadata()
        if jobs.computes:
            assert self._step_began is not None
            self.transfers.computed(
                jobs.computes, self._step_began, self.transfers.coder.beside.fence()
            )
        for save in jobs.saves:
            self.transfers.save(save)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        assert self.transfers is not None
        self.transfers.forget(finished_req_ids)
        return None, self.transfers.take_finished()

    def get_block_ids_with_load_errors(self) -> set[int]:
        assert self.transfers is not None
        return self.transfers.take_invalid()

    def shutdown(self) -> None:
        self._lookups.shutdown(wait=False, cancel_futures=True)
        if self.transfers is not None:
            self.transfers.flush(FLUSH_LIMIT_S)
            self.transfers.close()

    # Both

    def get_kv_connector_stats(self) -> CacheGenStats | None:
        return self.tally.take()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> CacheGenStats:
        return CacheGenStats(data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: Any, per_engine_labelvalues: Any
    ) -> CacheGenMetrics:
        return CacheGenMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)


def _fingerprint(
    vllm_config: Any, settings: ConnectorSettings, profile: Profile | None
) -> dict[str, Any]:
    """What all chunks of this server have in common."""
    model = vllm_config.model_config
    config = model.hf_config.to_json_string()
    return {
        "format": VERSION,
        "model": model.model,
        "revision": model.revision,
        "config": hashlib.sha256(config.encode()).hexdigest(),
        "dtype": str(model.dtype),
        "cache_dtype": vllm_config.cache_config.cache_dtype,
        "chunk_tokens": settings.chunk_tokens,
        "quantiser": settings.quantiser,
        "profile": profile.digest if profile else "",
    }


def _shaped_by(request: Any) -> dict[str, Any]:
    """What else a request's KV cache depends on."""
    lora = request.lora_request
    return {
        "lora": [lora.lora_name, lora.lora_path] if lora else None,
        "media": [[m.identifier, m.mm_position.offset] for m in request.mm_features or ()],
        "salt": request.cache_salt,
    }


def _layer_number(name: str) -> list[int]:
    return [int(part) for part in name.split(".") if part.isdigit()]
