"""The arithmetic of blocks, against worked numbers and a request grown token by token."""

from fractions import Fraction
from math import ceil

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from vllm_kvcompress.accounting import (
    Plan,
    Settings,
    blocks_to_keep,
    budget_tokens,
    ceil_div,
    held_share,
    plan,
    protected_tokens,
)

PLENTY = 1 << 30


@st.composite
def settings(draw: st.DrawFn) -> Settings:
    return Settings(
        preset="test",
        rate=draw(st.floats(1, 64)),
        budget_tokens=draw(st.none() | st.integers(1, 400)),
        window_tokens=draw(st.integers(1, 40)),
        sink_tokens=draw(st.integers(0, 40)),
        recent_tokens=draw(st.integers(0, 80)),
        continual=draw(st.booleans()),
        continual_slack_blocks=draw(st.integers(1, 4)),
        force_arena=draw(st.booleans()),
    )


prompts = st.integers(1, 300)
block_sizes = st.sampled_from([1, 2, 3, 8, 16, 32])


def grow(p: Plan, total: int) -> list[tuple[bool, int, int]]:
    """(compressed here, most blocks while there, blocks held after) for 1..total tokens.

    Plays design section 1 and 8 with lists of blocks: the first compression at the plan's own
    first point, the next ones whenever `slack_blocks` full blocks stand in the tail.
    """
    arena, natural, life = 0, [], []
    for token in range(1, total + 1):
        if (token - 1) % p.block_tokens == 0:
            natural.append(0)
        natural[-1] += 1
        full = sum(filled == p.block_tokens for filled in natural)
        first = token == p.first_point
        again = arena > 0 and p.slack_blocks is not None and full == p.slack_blocks
        most = arena + len(natural)
        if first or again:
            most += p.arena_blocks
            arena = p.arena_blocks
            natural = [filled for filled in natural if filled < p.block_tokens]
        life.append((first or again, most, arena + len(natural)))
    return life


@given(prompts, block_sizes, settings(), st.integers(0, 300))
def test_points_and_held_blocks_equal_a_request_grown_token_by_token(n, block, asked, more) -> None:
    p = plan(n, block, PLENTY, asked)
    life = grow(p, n + more)
    points = [c for c, (compressed, _, _) in enumerate(life, start=1) if compressed]
    for c, (compressed, _, held) in enumerate(life, start=1):
        assert p.is_point(c) == compressed
        assert p.blocks_held(c) == held
        assert p.last_point(c) == max((x for x in points if x <= c), default=None)
        coming = [x for x in points if x > c]
        if coming:
            assert p.next_point(c) == coming[0]
        else:
            following = p.next_point(c)
            assert following is None or following > n + more
    assert p.peak_blocks(n + more) == max(most for _, most, _ in life)
    if p.first_point is not None and p.first_point <= n + more:
        last = p.last_point(n + more)
        assert p.tail_start_block(last) == last // block


@given(prompts, block_sizes, settings())
def test_a_compressed_prompt_gets_smaller_and_has_room_for_what_is_protected(n, block, asked):
    p = plan(n, block, PLENTY, asked)
    if p.first_point is None:
        assert held_share(p) == 1.0
        return
    protected = sum(protected_tokens(n, block, asked))
    assert p.arena_blocks >= 1 and p.arena_blocks * block >= protected
    if p.first_point == n and not asked.force_arena:
        assert p.blocks_held(n) < ceil_div(n, block)
        assert 0 < held_share(p) < 1
        kept, wanted = p.arena_blocks * block, budget_tokens(n, asked) - n % block
        assert kept >= wanted
        if asked.continual:  # later the tail may hold no recent token
            protected = asked.sink_tokens + asked.recent_tokens
        assert kept - block < max(wanted, protected, 1), "one block less would do"


@given(prompts, block_sizes, settings(), st.integers(2, 60))
def test_the_pool_is_never_asked_for_more_than_it_has(n, block, asked, num_blocks) -> None:
    assume(ceil_div(n, block) <= num_blocks - 1)
    p = plan(n, block, num_blocks, asked)
    point = p.first_point
    if point is None:
        return
    assert p.peak_blocks(max(n, point)) <= num_blocks - 1
    if p.slack_blocks is not None:
        assert p.peak_blocks(point + 3 * p.slack_blocks * block) <= num_blocks - 1


@given(prompts, block_sizes, settings())
def test_protected_tokens_are_those_not_already_in_the_tail(n, block, asked) -> None:
    full = n // block * block
    stays = set(range(min(asked.sink_tokens, n))) | set(range(max(0, n - asked.recent_tokens), n))
    sinks, recent = protected_tokens(n, block, asked)
    assert sinks + recent == len([j for j in stays if j < full])


@pytest.mark.parametrize(
    ("n", "block", "changes", "kept"),
    [
        (3000, 32, {"rate": 4}, 23),  # ceil((750 - 24) / 32)
        (3000, 32, {"rate": 4, "recent_tokens": 32}, 23),
        (3000, 32, {"rate": 8}, 11),  # ceil((375 - 24) / 32)
        (3000, 32, {"rate": 1000}, 1),
        (3000, 32, {"rate": 1000, "sink_tokens": 4, "recent_tokens": 64}, 2),  # 4 + 64 - 24 = 44
        (3000, 32, {"budget_tokens": 500}, 15),  # ceil(476 / 32)
        (3000, 32, {"budget_tokens": 504}, 15),
        (3000, 32, {"budget_tokens": 505}, 16),
        (3000, 16, {"rate": 4}, 47),  # ceil((750 - 8) / 16)
        (1024, 32, {"rate": 8}, 4),
        (1, 32, {"rate": 8}, 1),
    ],
)
def test_blocks_to_keep_by_worked_numbers(n, block, changes, kept) -> None:
    assert blocks_to_keep(n, block, Settings("test", **changes)) == kept


def test_the_worked_request_holds_117_blocks_at_its_peak_and_24_afterwards() -> None:
    p = plan(3000, 32, 1000, Settings("test", rate=4, recent_tokens=32))
    assert p.peak_blocks(3000) == 117  # 94 of the prompt and 23 of the arena
    assert p.blocks_held(2999) == 94 and p.blocks_held(3000) == 24
    assert p.blocks_held(3008) == 24 and p.blocks_held(3009) == 25
    assert held_share(p) == (23 * 32 + 24) / 3000


def test_continual_cycles_between_one_and_slack_blocks_above_the_arena() -> None:
    p = plan(3000, 32, 1000, Settings("test", rate=4, continual=True, continual_slack_blocks=4))
    assert [p.next_point(0), p.next_point(3000), p.next_point(3104)] == [3000, 3104, 3232]
    held = [p.blocks_held(c) for c in range(3104, 3232)]
    assert min(held) == 23 and max(held) == 23 + 4
    assert p.peak_blocks(3000 + 10_000) == 117  # the prompt's own peak
    short = plan(100, 32, 1000, Settings("test", budget_tokens=96, continual=True))
    assert short.first_point == (3 + 4) * 32 and short.peak_blocks(1000) == 3 + 4 + 3


@pytest.mark.parametrize(
    ("n", "num_blocks", "asked"),
    [
        (3000, 1000, None),
        (3000, 1000, Settings("test", rate=1)),
        (31, 1000, Settings("test", rate=8)),  # no full block
        (40, 1000, Settings("test", rate=8)),  # one full block, one to keep
        (3000, 1000, Settings("test", budget_tokens=2992)),
        (3000, 117, Settings("test", rate=4)),  # 116 usable, 117 needed
    ],
)
def test_left_alone(n, num_blocks, asked) -> None:
    p = plan(n, 32, num_blocks, asked)
    assert p.first_point is None and p.next_point(0) is None and p.last_point(n) is None
    assert p.blocks_held(n) == p.peak_blocks(n) == ceil_div(n, 32)
    assert not p.is_point(n) and held_share(p) == 1.0


def test_compressed_as_soon_as_the_pool_has_room() -> None:
    assert plan(3000, 32, 118, Settings("test", rate=4)).first_point == 3000


def test_rate_one_goes_through_the_arena_only_when_forced() -> None:
    p = plan(3000, 32, 1000, Settings("test", rate=1, force_arena=True))
    assert p.first_point == 3000 and p.arena_blocks == 93 and p.blocks_held(3000) == 94


def test_a_fractional_rate_is_taken_exactly() -> None:
    asked = Settings("test", rate=1.1)
    assert budget_tokens(11, asked) == Fraction(11) / Fraction(1.1)
    assert blocks_to_keep(11, 1, asked) == ceil(Fraction(11) / Fraction(1.1))


@pytest.mark.parametrize(
    ("n", "block", "asked", "limit"),
    [
        (3000, 32, Settings("test", window_tokens=16), 2976),
        (3000, 32, Settings("test", window_tokens=64), 2912),
        (3000, 16, Settings("test", window_tokens=16), 2976),
        (70, 32, Settings("test", window_tokens=64), 0),
        (10, 32, Settings("test", window_tokens=16), None),
        (3000, 32, None, None),
        (3000, 32, Settings("test", rate=1), None),
    ],
)
def test_hits_stop_before_the_window(n, block, asked, limit) -> None:
    got = plan(n, block, PLENTY, asked).hit_limit_tokens(asked.window_tokens if asked else 0)
    assert got == limit


@given(prompts, block_sizes, settings())
def test_a_hit_leaves_the_window_to_compute(n, block, asked) -> None:
    p = plan(n, block, PLENTY, asked)
    limit = p.hit_limit_tokens(asked.window_tokens)
    if limit is not None:
        assert limit % block == 0
        assert limit <= max(0, p.first_point - asked.window_tokens) < limit + block
