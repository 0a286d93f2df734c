"""CUDA's kernels, built for this CPU, take Triton's place where they agree and are faster."""

from types import SimpleNamespace

import pytest
import torch
from kernels.caches import noise, poisoned_cache

from vllm_kvcompress.config import EngineConfig
from vllm_kvcompress.engine import page_kernels
from vllm_kvcompress.engine.attention import HeadCall
from vllm_kvcompress.engine.attention.triton import TritonEngine, newest
from vllm_kvcompress.engine.device_batch import Scratch
from vllm_kvcompress.engine.device_worker import KVCompressDeviceWorker
from vllm_kvcompress.engine.page_kernels import (
    Choice,
    choose_attention,
    choose_compaction,
    load_cuda,
)
from vllm_kvcompress.kernels import attend_pages, attend_pages_reference, compact, dispatch
from vllm_kvcompress.kernels.cuda import CudaPages
from vllm_kvcompress.paging.pool import PageFormat, PagePool

TRITON = [Choice(attend_pages, ("triton",)), Choice(compact, ("triton",))]
LAYERS, HEADS, GROUP, SIZE, B, BLOCKS, ROWS, WIDTH = 2, 3, 2, 16, 8, 6, 5, 4


@pytest.fixture
def pool():
    cache = torch.zeros(BLOCKS, LAYERS, HEADS, B, 2 * SIZE)
    return PagePool([cache[:, layer] for layer in range(LAYERS)], PageFormat.by_token(B, SIZE))


def chosen(asked, cuda, pool, group=GROUP):
    """For attention and for compaction."""
    scratch = Scratch(ROWS, HEADS, WIDTH, pool.device)
    attention = choose_attention(asked, cuda, pool, group, scratch, WIDTH * B)
    return [attention, choose_compaction(asked, cuda, pool)]


def clock(monkeypatch, cuda, most_cuda_sequences):
    """CUDA is faster up to so many sequences, and in compaction."""

    def seconds(kernel, args):
        kernel(*args)
        attends = kernel in (attend_pages, cuda.attend_pages)
        few = not attends or len(args[0]) <= most_cuda_sequences
        return 1.0 if few == (kernel in (cuda.attend_pages, cuda.compact)) else 2.0

    monkeypatch.setattr(dispatch, "_median_seconds", seconds)


def test_every_size_that_a_graph_may_capture_was_measured(cuda_on_host, pool, monkeypatch):
    cuda = CudaPages(cuda_on_host)
    clock(monkeypatch, cuda, most_cuda_sequences=2 * HEADS)
    attention, compaction = chosen("auto", cuda, pool)
    assert not pool.cache.any(), "an empty pool stays empty"
    monkeypatch.setattr(dispatch, "_median_seconds", None)
    names = [attention.kernel.choice(torch.empty(rows * HEADS)) for rows in range(1, ROWS + 1)]
    assert names == ["cuda", "cuda", "triton", "triton", "triton"]
    assert len(attention.kernel.measured) == 3 and compaction.kernel.choice() == "cuda"
    assert (attention.names, compaction.names) == (("cuda", "triton"), ("cuda",))


def test_the_engine_attends_with_what_was_chosen(cuda_on_host, pool, monkeypatch):
    cuda = CudaPages(cuda_on_host)
    clock(monkeypatch, cuda, most_cuda_sequences=2 * HEADS)
    engine = TritonEngine()
    engine.attend_pages = chosen("auto", cuda, pool)[0].kernel
    for lengths in ([9, 0, 20], [9, 0, 20, 5, 1, 30, 8]):
        cache = poisoned_cache(lengths, B, SIZE, torch.float32)
        queries = noise(len(lengths), GROUP, SIZE)
        call = HeadCall(
            queries=queries,
            keys=cache.keys,
            values=cache.values,
            tables=cache.tables,
            lengths=cache.lengths,
            query_start_loc=torch.arange(len(lengths) + 1),
            most_queries=1,
            longest=30,
            scale=0.25,
            softcap=0.0,
            out=torch.full_like(queries, torch.nan),
        )
        engine.attend(call)
        held = cache.keys, cache.values, cache.tables, cache.lengths
        want = attend_pages_reference(queries, *held, 0.25)
        torch.testing.assert_close(call.out.double(), want, rtol=0, atol=2e-5)


def test_what_is_asked_for_is_used(cuda_on_host, pool, monkeypatch):
    monkeypatch.setattr(page_kernels, "cuda_library", lambda: cuda_on_host)
    cuda = load_cuda("cuda")
    theirs = [Choice(cuda.attend_pages, ("cuda",)), Choice(cuda.compact, ("cuda",))]
    assert chosen("cuda", cuda, pool) == theirs
    assert chosen("triton", load_cuda("triton"), pool) == TRITON


def test_where_there_is_no_library_triton_does_it(pool):
    assert chosen("auto", load_cuda("auto"), pool) == TRITON
    with pytest.raises(ValueError, match="kernels=cuda: there is no library"):
        load_cuda("cuda")


def test_a_library_that_does_not_load_is_none(tmp_path, monkeypatch):
    broken = tmp_path / "broken.so"
    broken.write_text("no library")
    monkeypatch.setattr(page_kernels, "cuda_library", lambda: broken)
    assert load_cuda("auto") is None
    with pytest.raises(ValueError, match=r"kernels=cuda: .*broken.so cannot be loaded"):
        load_cuda("cuda")


@pytest.mark.parametrize("wrong", ["attention", "compaction"])
def test_only_the_kernel_that_does_not_agree_with_its_reference_is_out(
    cuda_on_host, pool, wrong, monkeypatch
):
    class Wrong(CudaPages):
        def attend_pages(self, *args, **options):
            super().attend_pages(*args, **options)
            if wrong == "attention":
                args[6].mul_(1.1)

        def compact(self, keys, *rest):
            super().compact(keys, *rest)
            if wrong == "compaction":
                keys[-1] += 1

    cuda = Wrong(cuda_on_host)
    clock(monkeypatch, cuda, most_cuda_sequences=ROWS * HEADS)
    said = []
    monkeypatch.setattr(
        page_kernels.logger, "warning", lambda *line: said.append(line[0] % line[1:])
    )
    names = dict(zip(["attention", "compaction"], chosen("auto", cuda, pool), strict=True))
    assert names.pop(wrong).names == ("triton",)
    assert [other.names for other in names.values()] == [("cuda",)]
    (line,) = said
    assert f"no CUDA {wrong}" in line and "differs" in line
    with pytest.raises(ValueError, match=rf"kernels=cuda: {wrong}.* differs"):
        chosen("cuda", cuda, pool)


@pytest.mark.parametrize(
    ("page_tokens", "group", "size", "taken"),
    [
        (24, GROUP, SIZE, ["triton", "cuda"]),
        (B, 9, SIZE, ["triton", "cuda"]),
        (B, GROUP, 18, ["triton", "triton"]),
        (512, GROUP, SIZE, ["cuda", "triton"]),
    ],
)
def test_a_shape_that_one_of_them_does_not_take_is_left_to_triton_there(
    cuda_on_host, page_tokens, group, size, taken, monkeypatch
):
    cache = torch.zeros(BLOCKS, 1, HEADS, page_tokens, 2 * size)
    pool = PagePool([cache[:, 0]], PageFormat.by_token(page_tokens, size))
    cuda = CudaPages(cuda_on_host)
    clock(monkeypatch, cuda, most_cuda_sequences=ROWS * HEADS)
    choices = chosen("auto", cuda, pool, group)
    assert [choice.names for choice in choices] == [(name,) for name in taken]


@pytest.mark.parametrize("own_kernels", [False, True])
def test_attention_is_chosen_only_for_an_engine_that_calls_it(
    own_kernels, cuda_on_host, pool, monkeypatch
):
    """With an engine that brings its own kernel, CUDA's attention is neither compared nor timed."""
    called = []

    class Noted(CudaPages):
        def attend_pages(self, *args, **options):
            called.append("attention")
            super().attend_pages(*args, **options)

        def compact(self, *args):
            called.append("compaction")
            super().compact(*args)

    class OtherEngine(TritonEngine):
        def __init__(self):
            self.attend_pages = None

        def attend(self, call):
            TritonEngine().attend(call)

    cuda = Noted(cuda_on_host)
    clock(monkeypatch, cuda, most_cuda_sequences=ROWS * HEADS)
    worker = object.__new__(KVCompressDeviceWorker)
    model_config = SimpleNamespace(
        max_model_len=WIDTH * B, get_num_attention_heads=lambda _: HEADS * GROUP
    )
    worker.vllm_config = SimpleNamespace(model_config=model_config, parallel_config=None)
    worker._sizes = lambda: (ROWS, HEADS, WIDTH)
    worker._engine = OtherEngine() if own_kernels else TritonEngine()
    worker._cuda = cuda
    compressor = worker.make_compressor(EngineConfig(), pool, 1.0)
    assert set(called) == ({"compaction"} if own_kernels else {"attention", "compaction"})
    assert compressor._compact.choice() == "cuda"
    if not own_kernels:
        assert worker._engine.attend_pages.choice(torch.empty(HEADS)) == "cuda"


def test_what_steps_outside_of_graphs_call_was_called_before(pool):
    """Splits follow a step's longest sequence, and a question has several query tokens."""
    scratch, longest = Scratch(ROWS, HEADS, WIDTH, pool.device), 4000
    pool.cache.normal_()
    shapes = set()
    for call in page_kernels.compiling(pool, GROUP, scratch, longest):
        TritonEngine().attend(call)
        rows = torch.arange(len(call.lengths)).repeat_interleave(call.most_queries)
        earlier = torch.arange(call.most_queries).flip(0).repeat(len(call.lengths))
        held = call.keys, call.values, call.tables[rows], call.lengths[rows] - earlier
        want = attend_pages_reference(call.queries, *held, call.scale)
        torch.testing.assert_close(call.out.double(), want, rtol=0, atol=2e-5)
        shapes.add((len(call.lengths), newest(call)[-2], call.most_queries))
    smallest = {(HEADS, splits, 1) for splits in (1, 2)} | {(HEADS, 2, 2)}
    assert shapes == smallest | {(rows * HEADS, 1, 1) for rows in (2, 5)}


@pytest.mark.parametrize("tokens", [1, 3 * B])
def test_batches_are_valid_calls(pool, tokens):
    scratch = Scratch(ROWS, HEADS, WIDTH, pool.device)
    pool.cache.normal_()
    for call in page_kernels.batches(pool, GROUP, scratch, WIDTH * B, tokens):
        TritonEngine().attend(call)
        held = call.keys, call.values, call.tables, call.lengths
        want = attend_pages_reference(call.queries, *held, call.scale)
        torch.testing.assert_close(call.out.double(), want, rtol=0, atol=2e-5)
        assert call.lengths.unique().tolist() == [min(tokens, len(held[0]) // len(call.out) * B)]
