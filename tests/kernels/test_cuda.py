"""The CUDA kernels' own source, run on this CPU thread by thread, equals the torch references."""

import shutil

import pytest
import torch
from kernels.caches import DTYPES, TOLERANCE, noise, poisoned_cache
from kernels.test_compaction import plan

from kernels import on_host
from vllm_kvcompress.kernels import attend_pages_reference, compact_reference, split_pages
from vllm_kvcompress.kernels.cuda import CudaError, CudaPages

GXX = shutil.which("g++")


@pytest.fixture(scope="module")
def cuda(tmp_path_factory):
    if GXX is None:
        pytest.skip("no g++ here to build the CUDA kernels for the CPU")
    return CudaPages(on_host.build(GXX, on_host.PAGES, tmp_path_factory.mktemp("pages")))


def check_attention(cuda, cache, queries, splits, softcap=0.0):
    out = torch.full_like(queries, torch.nan)
    scale = queries.shape[-1] ** -0.5
    args = (queries, cache.keys, cache.values, cache.tables, cache.lengths, scale)
    cuda.attend_pages(*args, out, splits, softcap)
    expected = attend_pages_reference(*args, softcap)
    tolerance = TOLERANCE[queries.dtype]
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [64, 80, 128, 256])
def test_attention_equals_dense_for_every_dtype_and_head_size(cuda, dtype, size):
    cache = poisoned_cache([37, 0, 1, 70], page_tokens=16, size=size, dtype=dtype)
    check_attention(cuda, cache, noise(4, 4, size, dtype=dtype), splits=2)


@pytest.mark.parametrize("group", range(1, 9))
def test_attention_of_every_group_size(cuda, group):
    cache = poisoned_cache([70, 33], page_tokens=16, size=64, dtype=torch.float16)
    check_attention(cuda, cache, noise(2, group, 64, dtype=torch.float16), splits=1)


@pytest.mark.parametrize("splits", [1, 2, 3, 7])
@pytest.mark.parametrize("page_tokens", [1, 8, 32])
def test_attention_splits_join_to_the_undivided_result(cuda, splits, page_tokens):
    cache = poisoned_cache([0, 1, 63, 64, 65, 200], page_tokens, size=64, dtype=torch.float32)
    check_attention(cuda, cache, noise(6, 2, 64), splits)


def test_attention_softcap(cuda):
    cache = poisoned_cache([90, 3], page_tokens=16, size=64, dtype=torch.float32)
    check_attention(cuda, cache, noise(2, 4, 64) * 20, splits=2, softcap=5.0)


def test_attention_of_large_logits_does_not_overflow(cuda):
    cache = poisoned_cache([100], page_tokens=16, size=64, dtype=torch.float32)
    queries = torch.full((1, 1, 64), 1e4)
    out = torch.empty_like(queries)
    args = (queries, cache.keys, cache.values, cache.tables, cache.lengths, 0.125)
    cuda.attend_pages(*args, out, splits=2)
    expected = attend_pages_reference(*args)
    torch.testing.assert_close(out.double(), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "beyond", [{"size": 260}, {"size": 68}, {"page_tokens": 24}, {"group": 9}, {"splits": 70_000}]
)
def test_attention_refuses_what_it_does_not_take(cuda, beyond):
    case = {"size": 64, "page_tokens": 16, "group": 1, "splits": 1}
    for name, shape in (("taken", case), ("refused", case | beyond)):
        cache = poisoned_cache([5], shape["page_tokens"], shape["size"], torch.float16)
        queries = noise(1, shape["group"], shape["size"], dtype=torch.float16)
        args = (queries, cache.keys, cache.values, cache.tables, cache.lengths, 1.0)
        if name == "taken":
            cuda.attend_pages(*args, queries.clone(), shape["splits"])
        else:
            with pytest.raises(CudaError, match="CUDA error 1 from attend_pages of"):
                cuda.attend_pages(*args, queries.clone(), shape["splits"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("page_tokens", "size"), [(16, 128), (1, 64), (24, 80), (32, 256)])
def test_compaction_moves_exactly_the_kept_tokens(cuda, dtype, page_tokens, size):
    pages, candidates, tokens, kept, arena_blocks = plan(5, 2, page_tokens, seed=size)
    pool = torch.full((pages, 1, page_tokens, 2 * size), torch.nan, dtype=dtype)
    used = candidates.flatten()
    pool[used] = torch.randn(len(used), 1, page_tokens, 2 * size).to(dtype)
    expected = pool.clone()
    compact_reference(*split_pages(expected), candidates, tokens, kept, arena_blocks)
    args = (*split_pages(pool), candidates, tokens, kept, arena_blocks)
    cuda.compact(*args)
    as_bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(pool.view(as_bits), expected.view(as_bits))


def test_compaction_refuses_rows_that_are_not_aligned(cuda):
    pages, candidates, tokens, kept, arena_blocks = plan(5, 2, 16, seed=0)
    pool = torch.zeros(pages, 1, 16, 2 * 68, dtype=torch.float16)
    args = (*split_pages(pool), candidates, tokens, kept, arena_blocks)
    with pytest.raises(CudaError, match="CUDA error 1 from compact in pages"):
        cuda.compact(*args)
