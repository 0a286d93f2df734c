"""Device memory that compressing one prompt takes beside the KV cache.

    python -P -m vllm_kvcompress.bench.compression_memory

Needs no GPU and no memory: the engine's own code runs on tensors without contents that believe
to be on one, and the bytes of those alive are counted. What torch's CUDA operators take inside
themselves is added as torch's source has it (`INSIDE`).
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from vllm_kvcompress import accounting
from vllm_kvcompress.bench.gpu.pretend import pretend
from vllm_kvcompress.bench.table import Table
from vllm_kvcompress.config import parse_engine_config
from vllm_kvcompress.engine.memory import ModelShape
from vllm_kvcompress.presets import shipped_presets

DEVICE = "gpu"
LLAMA_8B = ModelShape(
    layers=32, heads=8, query_heads=32, head_size=128, hidden_size=4096, dtype=torch.bfloat16
)
PAGE_TOKENS = 16
LOWEST_RATE = 1.01  # keeps all but a hundredth: the longest lists of kept tokens


def _sort(values: Tensor, *_: Any, **__: Any) -> int:
    """`aten/src/ATen/native/cuda/SortStable.cu`, on top of values and int64 indices."""
    n = values.shape[-1]
    segments = values.numel() // max(1, n)
    key = values.element_size()
    if n <= 4096:  # sorted in place by a block each
        return 0
    if segments == 1 or n >= 1_000_000:  # indices; keys and values once more inside CUB
        return n * (8 + key + 8)
    if segments < 128:  # (index, segment) twice, keys; keys and values once more inside CUB
        return values.numel() * (16 + key + key + 8)
    return values.numel() * (8 + key + 8)


def _cumsum(values: Tensor, *_: Any, dtype: torch.dtype | None = None, **__: Any) -> int:
    """The input as the result's type."""
    wanted = dtype or (torch.int64 if not values.is_floating_point() else values.dtype)
    return 0 if wanted == values.dtype else values.numel() * wanted.itemsize


def _masked_scatter(values: Tensor, *_: Any) -> int:
    """The mask's prefix sums, int64."""
    return 8 * values.numel()


INSIDE: dict[str, Callable[..., int]] = {
    "sort": _sort,
    "cumsum": _cumsum,
    "masked_scatter": _masked_scatter,
    "masked_scatter_": _masked_scatter,
}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the device's tensors made under it.

    peak: most of them at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function.namespace != "prim":
            with self:
                parts = function.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        self._forget_freed()
        result = function(*args, **kwargs)
        given = self._storages((args, kwargs))
        for storage, size in self._storages(result).items():
            if storage not in given:
                self._alive[storage] = size
        name = function.overloadpacket.__name__
        inside = INSIDE[name](*args, **kwargs) if name in INSIDE else 0
        self.peak = max(self.peak, sum(self._alive.values()) + inside)
        return result

    def _forget_freed(self) -> None:
        self._alive = {ref: size for ref, size in self._alive.items() if not ref.expired()}

    @staticmethod
    def _storages(tree: Any) -> dict[StorageWeakRef, int]:
        tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
        storages = [t.untyped_storage() for t in tensors if t.device.type == DEVICE]
        return {StorageWeakRef(storage): storage.nbytes() for storage in storages}


@contextmanager
def without_contents(richest_pages: int) -> Iterator[None]:
    """Tensors have no contents, kernels launch on nothing, nothing comes from the device.

    Args:
        richest_pages: what is told of the richest head before a request is compressed again.
    """
    from triton.runtime.interpreter import InterpretedFunction

    def uploaded(data: Any, device: Any = None, dtype: Any = None, **_: Any) -> Tensor:
        kind = dtype or (data.dtype if isinstance(data, Tensor) else torch.int32)
        return torch.empty(tuple(getattr(data, "shape", [len(data)])), dtype=kind, device=device)

    copy = SimpleNamespace(numpy=lambda: richest_pages)
    with (
        patch.object(InterpretedFunction, "run", lambda *_, **__: None),
        patch("vllm_kvcompress.paging.pool.async_tensor_h2d", uploaded),
        patch("vllm_kvcompress.paging.device_tables.HostCopy", lambda _: copy),
        FakeTensorMode(),
        torch.inference_mode(),
    ):
        yield


def move(pool: Any) -> None:
    """Let a pool, which looks at values while it is made, be on the device from here on."""
    flat = torch.empty(pool._flat.shape, dtype=pool._flat.dtype, device=DEVICE)
    pool._flat, pool.cache, pool.device = flat, flat.view(pool.cache.shape), flat.device
    for half in (pool._keys, pool._values):
        view = half._view
        half._flat, half._rows = flat, flat.view(half._rows.shape)
        half._view = flat.as_strided(view.shape, view.stride(), view.storage_offset())
        for index in ("_where", "_rows_of_page"):
            shape = getattr(half, index).shape
            setattr(half, index, torch.empty(shape, dtype=torch.int64, device=DEVICE))


@cache
def register_device() -> None:
    """Make `DEVICE` a device of torch's, without memory."""
    _setup_privateuseone_for_python_backend(DEVICE)


def peaks(preset: str, tokens: int, model: ModelShape, **overrides: Any) -> list[int]:
    """Most bytes alive while a prompt is compressed, and again where its preset does that.

    Again with all the pages that one head can have in one head's hands.
    """
    from vllm_kvcompress.engine.device_compressor import DeviceCompressor
    from vllm_kvcompress.engine.device_judge import DeviceJudge
    from vllm_kvcompress.paging.pool import PageFormat, PagePool

    register_device()
    config = parse_engine_config({"preset": preset, **overrides})
    settings = config.settings_or_off(None)
    assert settings is not None
    width = tokens // PAGE_TOKENS + settings.continual_slack_blocks + 2
    num_blocks = 4 * width  # of which two are there, and stand for all
    plan = accounting.plan(tokens, PAGE_TOKENS, num_blocks, settings)
    points = [tokens]
    if (again := plan.next_point(tokens)) is not None:
        points.append(again)
    shape = 2, model.layers, model.heads, PAGE_TOKENS, 2 * model.head_size
    cache = torch.zeros(shape, dtype=model.dtype)
    page_format = PageFormat.by_token(PAGE_TOKENS, model.head_size)
    pool = PagePool([cache[:, layer] for layer in range(model.layers)], page_format)
    natural, found = [1] * width, []
    with without_contents(tokens // PAGE_TOKENS):
        move(pool)
        pool.num_blocks = num_blocks
        judge = DeviceJudge(config, pool, model.head_size**-0.5)
        compressor = DeviceCompressor(config, pool, judge, 1, width)
        for point in points:
            window = min(settings.window_tokens, point)
            compressor.begin_step(_step(point, window, point == tokens, plan.arena_blocks))
            query = torch.empty(
                window, model.query_heads, model.head_size, dtype=model.dtype, device=DEVICE
            )
            for capture in compressor.captures(["r"], np.array([0, window])):
                for layer in range(model.layers):
                    capture.take(layer, query)
            with LiveBytes() as live:
                if compressor.propagating:
                    compressor.select("r", natural)
                compressor.finish_step(lambda _: natural)
            found.append(live.peak)
    return found


def _step(end: int, count: int, first: bool, arena: int) -> Any:
    """The last `count` tokens before a compression point, as the scheduler tells of them."""
    ids = ([1] * arena,)
    new = SimpleNamespace(
        req_id="r",
        prompt_token_ids=range(end),
        prompt_embeds=None,
        sampling_params=SimpleNamespace(extra_args=None),
        num_computed_tokens=end - count,
        block_ids=ids,
    )
    running = SimpleNamespace(
        req_ids=[] if first else ["r"],
        resumed_req_ids=set(),
        new_block_ids=[ids],
        num_computed_tokens=[end - count],
    )
    return SimpleNamespace(
        finished_req_ids=(),
        preempted_req_ids=None,
        scheduled_new_reqs=[new] if first else [],
        scheduled_cached_reqs=running,
        num_scheduled_tokens={"r": count},
    )


def table(tokens: int) -> Table:
    """Peaks of all shipped presets on an 8B model."""
    scores = 4 * LLAMA_8B.layers * LLAMA_8B.heads * tokens

    def cells(peak: int) -> list[str]:
        return [f"{peak / 2**20:,.0f}", f"{peak / scores:.1f}"]

    rows = []
    for name in sorted(shipped_presets()):
        own, nearly_all = (peaks(name, tokens, LLAMA_8B, **r) for r in ({}, {"rate": LOWEST_RATE}))
        for what, pair in zip(("", ", again"), zip(own, nearly_all, strict=True), strict=False):
            rows.append([name + what, *cells(pair[0]), *cells(pair[1])])
    rows.append(["kept from the cache", "", "", *cells(LLAMA_8B.compression_bytes(tokens))])
    return Table(
        f"Compressing {tokens:,} tokens, 8B model, blocks of {PAGE_TOKENS}",
        ("preset", "MiB", "x scores", f"MiB at rate {LOWEST_RATE}", "x scores"),
        rows,
        f"The scores are one f32 per layer, KV head and token, {scores / 2**20:,.0f} MiB.",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--tokens", type=int, default=1 << 17, help="1024 to 1048576")
    arguments = parser.parse_args()
    pretend(engine=False)
    if not 1 << 10 <= arguments.tokens <= 1 << 20:
        parser.error(f"--tokens {arguments.tokens} is not between 1024 and 1048576")
    Console().print(table(arguments.tokens).rich())


if __name__ == "__main__":
    main()
