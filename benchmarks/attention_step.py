"""One decode step's attention without an engine: vLLM's CPU kernel on random keys and values."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import ceil
from types import SimpleNamespace
from typing import Any, NamedTuple

from vllm_kvcompress.bench.engine import BLOCK_TOKENS, MODEL
from vllm_kvcompress.bench.errors import BenchError


@dataclass(frozen=True)
class Shape:
    """What attention is over: L layers, H KV heads of G query heads each, D wide."""

    name: str
    title: str
    layers: int
    kv_heads: int
    group: int
    head_size: int
    dtype: str

    @property
    def bytes_per_kv(self) -> int:
        """Bytes of one token's key and value in one head of one layer."""
        return 2 * self.head_size * {"float32": 4, "bfloat16": 2, "float16": 2}[self.dtype]


SHAPES = {
    "demo": Shape("demo model", "the demo model's shape", 4, 4, 2, 32, "float32"),
    "8b": Shape("8B", "an 8B model's shape, 4 layers of it", 4, 8, 4, 128, "bfloat16"),
}


class Point(NamedTuple):
    requests: int
    tokens: int

    def text(self) -> str:
        return f"{self.requests} x {self.tokens:,}"


def gib(shape: Shape, point: Point) -> float:
    """Size of the cache at a point."""
    blocks = point.requests * (point.tokens // BLOCK_TOKENS + 1)
    return blocks * BLOCK_TOKENS * shape.layers * shape.kv_heads * shape.bytes_per_kv / 2**30


@dataclass(frozen=True)
class Attention:
    """A way to compute one step's attention in all layers, and what it reads for that.

    kvs: (token, head) pairs per layer, on average over the layers.
    """

    step: Callable[[], Any]
    kvs: float


def load_kernels() -> None:
    """Raises BenchError where vLLM is not built for CPUs."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        raise BenchError("bench attention measures vLLM's CPU kernel; this vLLM is not for CPUs")
    current_platform.import_kernels()


class Cache:
    """Random keys and values of `requests` requests of `tokens` tokens, in scattered blocks.

    The same memory is seen as vLLM lays it out, layer by layer, and as a pool of pages.
    """

    def __init__(self, shape: Shape, point: Point, spread: float, seed: int = 0) -> None:
        import torch
        from vllm.v1.attention.backends import cpu_attn

        from vllm_kvcompress.paging.formats import page_format
        from vllm_kvcompress.paging.pool import PagePool

        self.shape, self.point, self.spread = shape, point, spread
        self.dtype = getattr(torch, shape.dtype)
        self._random = torch.Generator().manual_seed(seed)
        self.full_blocks = point.tokens // BLOCK_TOKENS
        each = self.full_blocks + 1  # the tail's
        L, H, B, D = shape.layers, shape.kv_heads, BLOCK_TOKENS, shape.head_size
        blocks = point.requests * each
        flat = torch.empty(blocks * L * H * B * 2 * D, dtype=self.dtype)
        flat.normal_(generator=self._random)
        self.by_layer = flat.view(L, blocks, H, B, 2 * D)
        by_block = flat.view(blocks, L, H, B, 2 * D)
        views = [by_block[:, l] for l in range(L)]
        isa = cpu_attn._get_attn_isa(self.dtype, B, D, "auto")
        self.layer: Any = SimpleNamespace(
            isa=isa,
            attn_backend=cpu_attn.CPUAttentionBackend,
            _k_scale_float=1.0,
            _v_scale_float=1.0,
        )
        self.pool = PagePool(views, page_format(self.layer, views[0]))
        scattered = list(range(blocks))
        random.Random(seed).shuffle(scattered)
        self.blocks = [scattered[r * each : (r + 1) * each] for r in range(point.requests)]
        heads = shape.kv_heads * shape.group
        self.query = torch.empty(point.requests, heads, D, dtype=self.dtype)
        self.query.normal_(generator=self._random)
        self.query_start = torch.arange(point.requests + 1, dtype=torch.int32)

    def dense(self, tokens: int) -> Attention:
        """vLLM's own attention of one new token per request over `tokens` and itself."""
        import torch
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

        table = torch.tensor(self.blocks, dtype=torch.int32)
        seq_lens = torch.full((self.point.requests,), tokens + 1, dtype=torch.int32)
        impl = self._impl(CPUAttentionBackendImpl)
        output = torch.empty_like(self.query)

        def step() -> Any:
            metadata = self._metadata(seq_lens, table, schedule=True)
            for kv_cache in self.by_layer:
                impl.forward(self.layer, self.query, None, None, kv_cache, metadata, output)
            return output

        return Attention(step, self.point.requests * self.shape.kv_heads * (tokens + 1))

    def per_head(self, rate: float) -> Attention:
        """This project's attention over arenas of a `rate`-th of the tokens, dealt unevenly."""
        import torch

        from vllm_kvcompress.engine.cpu import PerHeadAttentionImpl

        heads = self.head_batch(rate)
        impls = [self._impl(PerHeadAttentionImpl) for _ in self.by_layer]
        for layer, impl in enumerate(impls):
            impl.bind(self.pool, layer)
        output = torch.empty_like(self.query)
        seq_lens = torch.ones(self.point.requests, dtype=torch.int32)
        metadata = self._metadata(seq_lens, None, schedule=False, heads=heads)

        def step() -> Any:
            for impl, kv_cache in zip(impls, self.by_layer, strict=True):
                impl.forward(self.layer, self.query, None, None, kv_cache, metadata, output)
            return output

        return Attention(step, int(heads.seq_lens.sum()) / self.shape.layers)

    def arena_blocks(self, rate: float) -> int:
        return max(1, ceil(self.point.tokens / rate / BLOCK_TOKENS))

    def head_batch(self, rate: float) -> Any:
        """Each request's arena, its pages dealt out by log-normal weights, and a tail of one."""
        import numpy as np
        import torch

        from vllm_kvcompress.engine.batch import HeadBatch
        from vllm_kvcompress.paging.tables import PageTables
        from vllm_kvcompress.policy.pages import apportion

        tables, count = PageTables(self.pool), self.arena_blocks(rate)
        shape = (self.shape.layers, self.shape.kv_heads)
        lanes = self.pool.pages_per_block
        least = torch.ones(lanes, dtype=torch.int64)
        for request, blocks in enumerate(self.blocks):
            weights = (self.spread * torch.randn(lanes, generator=self._random)).exp()
            pages = apportion(weights, count * lanes, least, least * self.full_blocks)
            arena = self.pool.block_pages(torch.tensor(blocks[:count]))
            tables.put(str(request), pages.view(shape), arena, self.full_blocks * BLOCK_TOKENS)
        rows = np.arange(self.point.requests).repeat(2).reshape(-1, 2)
        ends = np.full(len(rows), self.full_blocks * BLOCK_TOKENS + 1)
        return HeadBatch.build(
            tables, rows, self.query_start.numpy(), ends, self.blocks.__getitem__
        )

    def _impl(self, kind: Any) -> Any:
        from vllm.config import set_current_vllm_config

        with set_current_vllm_config(_some_config(self.shape.dtype)):
            return kind(
                num_heads=self.shape.kv_heads * self.shape.group,
                head_size=self.shape.head_size,
                scale=self.shape.head_size**-0.5,
                num_kv_heads=self.shape.kv_heads,
                alibi_slopes=None,
                sliding_window=None,
                kv_cache_dtype="auto",
            )

    def _metadata(self, seq_lens: Any, table: Any, schedule: bool, heads: Any = None) -> Any:
        """Of one new token per request; with the kernel's own schedule where it is wanted."""
        from vllm import _custom_ops as ops
        from vllm import envs

        from vllm_kvcompress.engine.cpu import PerHeadMetadata

        plan = schedule and ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(seq_lens),
            num_heads=self.shape.kv_heads * self.shape.group,
            num_kv_heads=self.shape.kv_heads,
            head_dim=self.shape.head_size,
            seq_lens=seq_lens,
            dtype=self.dtype,
            query_start_loc=self.query_start,
            causal=True,
            sliding_window_size=-1,
            isa=self.layer.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
        )
        return PerHeadMetadata(
            num_actual_tokens=len(self.query),
            max_query_len=1,
            query_start_loc=self.query_start,
            max_seq_len=int(seq_lens.max()),
            seq_lens=seq_lens,
            block_table=table,
            slot_mapping=None,
            scheduler_metadata=plan if schedule else None,
            heads=heads,
        )


@cache
def _some_config(dtype: str) -> Any:
    """vLLM's attention asks the configuration for the dtype, whatever the model."""
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(model=str(MODEL), dtype=dtype, enforce_eager=True).create_engine_config()
