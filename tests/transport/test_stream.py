"""The streaming policy, against worked examples and as properties."""

from hypothesis import given
from hypothesis import strategies as st

from vllm_kvcompress.transport.stream import (
    CarriedSlack,
    EqualShares,
    FixedLevel,
    Progress,
    StreamPolicy,
)

MB = 10**6
SIZES = {3: 28 * MB, 2: 20 * MB, 1: 14 * MB}


def stream(
    policy: StreamPolicy,
    gbps: list[float],
    recompute_s: float | None,
    *,
    foreseen: bool,
    sizes: dict[int, int] = SIZES,
) -> tuple[list[int], float]:
    """(levels, seconds) of chunks sent one after another; `foreseen`: each chunk's own bandwidth
    is known beforehand, as in the artifact's trace, else only that of the chunk before."""
    levels, elapsed, rate = [], 0.0, None
    for i, bandwidth in enumerate(gbps):
        now = bandwidth * 1e9 / 8
        progress = Progress(
            remaining=[sizes] * (len(gbps) - i),
            total_chunks=len(gbps),
            elapsed_s=elapsed,
            bytes_per_s=now if foreseen else rate,
            recompute_s=recompute_s,
        )
        level = policy.choose(progress)
        levels.append(level)
        if level:
            elapsed += sizes[level] / now
            rate = now
        else:
            elapsed += recompute_s
    return levels, elapsed


def test_equal_shares_gives_the_worked_example():
    levels, seconds = stream(EqualShares(1.0), [2, 0.7, 0.5, 6], 0.2, foreseen=True)
    assert levels == [3, 2, 1, 3]
    assert round(seconds, 4) == 0.6019


def test_carried_slack_gives_the_worked_example():
    levels, seconds = stream(CarriedSlack(1.0), [2, 0.2, 1, 2], 0.3, foreseen=False)
    assert levels == [2, 0, 0, 0]
    assert round(seconds, 2) == 0.98


@given(gbps=st.floats(0.05, 50), chunks=st.integers(2, 30), slow=st.floats(0.5, 100))
def test_constant_bandwidth_meets_the_target_whenever_the_middle_level_does(gbps, chunks, slow):
    """Nobody can know better before the first transfer."""
    target = chunks * SIZES[2] * 8 / (gbps * 1e9) * 1.0001
    levels, seconds = stream(CarriedSlack(target), [gbps] * chunks, slow, foreseen=False)
    assert seconds <= target
    assert all(levels) or slow * chunks <= target


@given(gbps=st.floats(0.05, 50), chunks=st.integers(2, 30), target=st.floats(0.1, 60))
def test_a_target_some_level_meets_is_met_with_the_rate_known(gbps, chunks, target):
    feasible = chunks * SIZES[1] * 8 / (gbps * 1e9) <= target * 0.9999
    _, seconds = stream(CarriedSlack(target), [gbps] * chunks, None, foreseen=True)
    assert seconds <= target or not feasible


@given(
    rates=st.tuples(st.floats(1e5, 1e10), st.floats(1e5, 1e10)),
    left=st.floats(0.01, 60),
    chunks=st.integers(1, 20),
)
def test_more_bandwidth_never_lowers_the_level(rates, left, chunks):
    for policy in (CarriedSlack(left), EqualShares(left)):
        low, high = (
            policy.choose(Progress([SIZES] * chunks, chunks, 0.0, rate, None))
            for rate in sorted(rates)
        )
        assert low <= high


def test_a_drop_in_bandwidth_lowers_the_level_within_one_chunk():
    levels, _ = stream(CarriedSlack(1.0), [2, 2, 0.3, 0.3, 0.3, 0.3], None, foreseen=False)
    assert levels[3] < levels[2]


def test_the_text_is_taken_only_where_recomputing_is_a_choice():
    slow = Progress([SIZES] * 3, 3, 0.0, 1000.0, None)
    assert CarriedSlack(0.1).choose(slow) == 1
    assert EqualShares(0.1).choose(slow) == 1
    fast = Progress([SIZES] * 3, 3, 0.0, 1000.0, 0.2)
    assert CarriedSlack(0.1).choose(fast) == 0
    assert EqualShares(0.1).choose(fast) == 0


def test_a_fixed_level_takes_the_nearest_stored_one():
    some = Progress([{1: 5, 3: 9}], 1, 0.0, None, None)
    assert [FixedLevel(level).choose(some) for level in (1, 2, 3, 4)] == [1, 1, 3, 3]
    assert FixedLevel(1).choose(Progress([{3: 9}], 1, 0.0, None, None)) == 3
