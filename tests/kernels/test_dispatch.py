"""The fastest kernel is called, by what was measured for that kind of call."""

import pytest
import torch
from kernels.caches import noise, poisoned_cache

from vllm_kvcompress.kernels import attend_pages, attend_pages_reference
from vllm_kvcompress.kernels.dispatch import Fastest


class Calls:
    """Two kernels that only note who was called, and a clock that says what each would take."""

    def __init__(self, seconds):
        self.seconds, self.called, self.timed = seconds, [], 0

    def kernels(self):
        return {name: lambda *args, name=name: self.called.append(name) for name in ("a", "b")}

    def time(self, kernel, args):
        self.timed += 1
        kernel(*args)
        return self.seconds[args[0]][self.called.pop()]

    def fastest(self):
        return Fastest(self.kernels(), kind=lambda size: size, seconds=self.time)


def test_each_kind_of_call_goes_to_its_own_fastest_and_is_measured_once():
    calls = Calls({8: {"a": 1.0, "b": 2.0}, 64: {"a": 4.0, "b": 2.0}})
    fastest = calls.fastest()
    for size in (8, 64):
        fastest.measure(size)
    for size in (8, 64, 8, 64, 512):
        fastest(size)
    assert calls.called == ["a", "b", "a", "b", "a"], "what was not measured goes to the first"
    assert calls.timed == 4
    assert fastest.measured == calls.seconds


def test_a_kernel_that_does_not_take_the_call_is_out():
    def picky(size):
        raise RuntimeError("too large")

    fastest = Fastest({"any": lambda size: None, "picky": picky}, kind=lambda size: size)
    fastest.measure(8)
    assert fastest.choice(8) == "any"
    assert list(fastest.measured[8]) == ["any"]


def test_the_default_kernel_may_not_fail():
    def broken(size):
        raise RuntimeError("out of order")

    with pytest.raises(RuntimeError, match="out of order"):
        Fastest({"broken": broken}, kind=lambda size: size).measure(8)


def test_the_result_is_the_kernels_own():
    def by_reference(queries, keys, values, tables, lengths, scale, out):
        out.copy_(attend_pages_reference(queries, keys, values, tables, lengths, scale))

    cache = poisoned_cache([20, 3], page_tokens=16, size=64, dtype=torch.float32)
    queries, out = noise(2, 2, 64), torch.full((2, 2, 64), torch.nan)
    args = (queries, cache.keys, cache.values, cache.tables, cache.lengths, 0.125)
    attend = Fastest(
        {"triton": attend_pages, "reference": by_reference},
        kind=lambda queries, *rest: queries.shape,
    )
    attend.measure(*args, out)
    out.fill_(torch.nan)
    attend(*args, out)
    torch.testing.assert_close(out.double(), attend_pages_reference(*args), atol=2e-5, rtol=2e-5)
    assert set(attend.measured[queries.shape]) == {"triton", "reference"}
