"""Decode attention on pages equals softmax attention over the very same tokens."""

import pytest
import torch
from kernels.caches import DTYPES, TOLERANCE, noise, poisoned_cache

from vllm_kvcompress.kernels import attend_pages, attend_pages_reference, splits_for


def attend(cache, queries, splits, softcap=0.0):
    out = torch.full_like(queries, torch.nan)
    scale = queries.shape[-1] ** -0.5
    args = (queries, cache.keys, cache.values, cache.tables, cache.lengths, scale)
    attend_pages(*args, out, splits, softcap)
    return out.double(), attend_pages_reference(*args, softcap)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [64, 80, 128, 256])
def test_equals_dense_attention_for_every_dtype_and_head_size(dtype, size):
    cache = poisoned_cache([37, 0, 1, 130, 16], page_tokens=16, size=size, dtype=dtype)
    out, expected = attend(cache, noise(5, 4, size, dtype=dtype), splits=2)
    torch.testing.assert_close(out, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("group", range(1, 9))
def test_all_query_heads_of_a_group_share_one_tile(group):
    cache = poisoned_cache([70, 33], page_tokens=16, size=64, dtype=torch.float32)
    out, expected = attend(cache, noise(2, group, 64), splits=1)
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("splits", "page_tokens"), [(1, 16), (2, 8), (3, 32), (7, 1), (7, 48), (16, 16)]
)
def test_splits_join_to_the_undivided_result(splits, page_tokens):
    lengths = [0, 1, 63, 64, 65, 257]
    cache = poisoned_cache(lengths, page_tokens, size=64, dtype=torch.float32)
    out, expected = attend(cache, noise(6, 2, 64), splits)
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=2e-5)


def test_a_sequence_without_tokens_gets_zeros():
    cache = poisoned_cache([0, 5], page_tokens=16, size=64, dtype=torch.float16)
    out, _ = attend(cache, noise(2, 2, 64, dtype=torch.float16), splits=3)
    assert not out[0].any() and out[1].any()


def test_large_logits_do_not_overflow():
    cache = poisoned_cache([100], page_tokens=16, size=64, dtype=torch.float32)
    out, expected = attend(cache, noise(1, 2, 64) * 1e4, splits=2)
    torch.testing.assert_close(out, expected, atol=1e-3, rtol=1e-3)


def test_softcap_bends_the_logits():
    cache = poisoned_cache([90, 3], page_tokens=16, size=64, dtype=torch.float32)
    queries = noise(2, 4, 64) * 20
    out, expected = attend(cache, queries, splits=2, softcap=5.0)
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=2e-5)
    assert (attend(cache, queries, splits=2)[0] - out).abs().max() > 0.01


def test_strided_queries_and_outputs_are_taken_as_they_are():
    cache = poisoned_cache([40, 41, 9, 17], page_tokens=16, size=64, dtype=torch.float32)
    fused = noise(4, 3, 6, 64)  # [S, q and k and v, G, D]
    queries = fused[:, 1, ::2]
    out = torch.full((4, 6, 64), torch.nan)
    args = (queries, cache.keys, cache.values, cache.tables, cache.lengths, 0.125)
    attend_pages(*args, out[:, 1::2], splits=2)
    expected = attend_pages_reference(*args)
    torch.testing.assert_close(out[:, 1::2].double(), expected, atol=2e-5, rtol=2e-5)
    assert out[:, ::2].isnan().all()


def test_splits_fill_the_device_but_stay_long():
    assert splits_for(sequences=4096, longest=100_000, processors=132) == 1
    assert splits_for(sequences=8, longest=100_000, processors=132) == 66
    assert splits_for(sequences=8, longest=600, processors=132) == 3
    assert splits_for(sequences=1, longest=0, processors=132) == 1
