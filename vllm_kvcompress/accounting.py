"""The arithmetic that scheduler and worker both do, so that they never have to talk.

How many *pages* a head keeps depends on the data; how many *blocks* a request keeps depends
only on the numbers here. Everything is a pure function of the prompt length, the block size
and the request's `Settings`. Units are in the names; `n` is the prompt length in tokens.
"""

from dataclasses import dataclass
from fractions import Fraction
from math import ceil


@dataclass(frozen=True, slots=True)
class Settings:
    """What one request asked for, resolved: the numbers of its preset and its own knobs.

    `budget_tokens`, where given, rules over `rate`. `window_tokens` is the number of last
    prompt queries that judge the rest; `sink_tokens` and `recent_tokens` are kept in every head.
    The last `question_tokens` of a prompt take no part: what stands before them is compressed
    without having seen them, and they follow as decoded tokens do.
    With `tsp_rate` or `tsp_tokens` so many prompt tokens go on above layer `tsp_layer`.
    `task` is the class of the request's task where its preset tells classes apart.
    """

    preset: str
    rate: float = 8.0
    budget_tokens: int | None = None
    window_tokens: int = 16
    sink_tokens: int = 0
    recent_tokens: int = 0
    question_tokens: int = 0
    continual: bool = False
    continual_slack_blocks: int = 4
    force_arena: bool = False
    task: str | None = None
    tsp_rate: float | None = None
    tsp_tokens: int | None = None

    def wishes_compression(self) -> bool:
        """Whether any prompt at all could be compressed under these settings."""
        return self.force_arena or self.budget_tokens is not None or self.rate > 1


@dataclass(frozen=True, slots=True)
class Plan:
    """What happens to the blocks of one request: the answer both sides compute alike.

    The prompt's `full_blocks` give way to `arena_blocks` once `prompt_tokens` are computed;
    with continual compression the same happens again at every `next_point`.
    `first_point` is the number of computed tokens at which the first compression happens, or
    None when the request is left alone. `prompt_tokens` are those before the question.
    `tsp_tokens` is the number of prompt tokens that the deep layers see, None for all.
    """

    prompt_tokens: int
    block_tokens: int
    arena_blocks: int
    first_point: int | None
    slack_blocks: int | None
    tsp_tokens: int | None = None

    def tail_start_block(self, point: int) -> int:
        """Index of the first natural block that stays after the compression at `point`."""
        return point // self.block_tokens

    def next_point(self, computed_tokens: int) -> int | None:
        """Smallest compression point `> computed_tokens`, or None."""
        if self.first_point is None or computed_tokens < self.first_point:
            return self.first_point
        if self.slack_blocks is None:
            return None
        return self._point(self._periods(computed_tokens) + 1)

    def next_stop(self, computed_tokens: int) -> int | None:
        """Smallest number `> computed_tokens` at which a chunk must end, or None."""
        if self.tsp_tokens is not None and computed_tokens < self.prompt_tokens:
            return self.prompt_tokens
        return self.next_point(computed_tokens)

    def last_point(self, computed_tokens: int) -> int | None:
        """Largest compression point `<= computed_tokens`, or None."""
        if self.first_point is None or computed_tokens < self.first_point:
            return None
        if self.slack_blocks is None:
            return self.first_point
        return self._point(self._periods(computed_tokens))

    def is_point(self, computed_tokens: int) -> bool:
        return self.last_point(computed_tokens) == computed_tokens

    def blocks_held(self, computed_tokens: int) -> int:
        """Blocks held once the compression due at `computed_tokens`, if any, is done."""
        natural = ceil_div(computed_tokens, self.block_tokens)
        point = self.last_point(computed_tokens)
        if point is None:
            return natural
        return self.arena_blocks + natural - self.tail_start_block(point)

    def prompt_peak_blocks(self) -> int:
        """Blocks held while the first compression copies: its sources and its arena."""
        assert self.first_point is not None
        return ceil_div(self.first_point, self.block_tokens) + self.arena_blocks

    def later_peak_blocks(self, total_tokens: int) -> int:
        """Most blocks held after the first compression until `total_tokens` are computed."""
        peak = self.blocks_held(total_tokens)
        if self.first_point is None or self.slack_blocks is None:
            return peak
        second = self.next_point(self.first_point)
        assert second is not None
        if second <= total_tokens:  # every later cycle peaks alike: two arenas and a full tail
            peak = max(peak, 2 * self.arena_blocks + self.slack_blocks)
        return peak

    def peak_blocks(self, total_tokens: int) -> int:
        """Most blocks held at any moment while `total_tokens` tokens are computed."""
        if self.first_point is None or total_tokens < self.first_point:
            return self.blocks_held(total_tokens)
        return max(self.prompt_peak_blocks(), self.later_peak_blocks(total_tokens))

    def hit_limit_tokens(self, window_tokens: int) -> int | None:
        """Most tokens a prefix-cache hit may cover, None for any number.

        The queries that judge the prompt must be computed again, and at least its last token,
        for otherwise no step would end at `first_point`.
        """
        if self.tsp_tokens is not None:  # no block holds what all layers need
            return 0
        if self.first_point is None:
            return None
        limit = self.first_point - max(1, window_tokens)
        return max(0, limit) // self.block_tokens * self.block_tokens

    def publish_limit_tokens(self) -> int | None:
        """Most tokens whose blocks others may use, None for any number.

        What follows the first compression saw a compressed context; of a prompt whose deep layers
        hold selected tokens only, nothing is of use.
        """
        return 0 if self.tsp_tokens is not None else self.first_point

    def _periods(self, computed_tokens: int) -> int:
        """How many recompressions lie between `first_point` and `computed_tokens`."""
        assert self.first_point is not None and self.slack_blocks is not None
        tokens = computed_tokens // self.block_tokens * self.block_tokens
        first = self.first_point // self.block_tokens * self.block_tokens
        return (tokens - first) // (self.slack_blocks * self.block_tokens)

    def _point(self, periods: int) -> int:
        """The compression point `periods` recompressions after the first."""
        assert self.first_point is not None
        if periods == 0:
            return self.first_point
        assert self.slack_blocks is not None
        blocks = self.first_point // self.block_tokens + periods * self.slack_blocks
        return blocks * self.block_tokens


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def budget_tokens(n: int, settings: Settings) -> Fraction:
    """Held prompt tokens per head on average, `b`, exactly: `n / rate` or the budget itself."""
    if settings.budget_tokens is not None:
        return Fraction(settings.budget_tokens)
    return n / Fraction(settings.rate)


def protected_tokens(n: int, block_tokens: int, settings: Settings) -> tuple[int, int]:
    """(sinks, recent) tokens of the prompt's full blocks that every head must keep.

    The newest `n mod B` tokens sit in the tail and are kept anyway, so they count as recent.
    """
    full = n // block_tokens * block_tokens
    sinks = min(settings.sink_tokens, full)
    recent = min(max(0, settings.recent_tokens - (n - full)), full - sinks)
    return sinks, recent


def _protected_for_good(n: int, block_tokens: int, settings: Settings) -> int:
    """Tokens that every head must keep in its arena, at any compression point."""
    if settings.continual:  # at a later point no partly filled block holds recent tokens
        return settings.sink_tokens + settings.recent_tokens
    return sum(protected_tokens(n, block_tokens, settings))


def blocks_to_keep(n: int, block_tokens: int, settings: Settings) -> int:
    """`K = max(1, ceil(protected/B), ceil((b - t)/B))`: the arena's size in blocks."""
    tail = n % block_tokens
    protected = _protected_for_good(n, block_tokens, settings)
    wanted = ceil((budget_tokens(n, settings) - tail) / block_tokens)
    return max(1, ceil_div(protected, block_tokens), wanted)


def tsp_selected_tokens(n: int, block_tokens: int, settings: Settings) -> int | None:
    """How many of n prompt tokens the deep layers see, None for all.

    Whole blocks and the tail, so that what follows stands where vLLM expects it: the tokens
    asked for, rounded up, and at least the window and what is protected.
    """
    if settings.tsp_rate is None and settings.tsp_tokens is None:
        return None
    full, tail = divmod(n, block_tokens)
    wanted = settings.tsp_tokens or int(n * (settings.tsp_rate or 1.0))
    least = max(wanted - tail, settings.window_tokens - tail, 1)
    least = max(least, _protected_for_good(n, block_tokens, settings))
    blocks = ceil_div(least, block_tokens)
    if settings.force_arena:
        return min(blocks, full) * block_tokens + tail if full else None
    return blocks * block_tokens + tail if blocks < full else None


def plan(n: int, block_tokens: int, num_blocks: int, settings: Settings | None) -> Plan:
    """Decide what happens to a prompt of `n` tokens in a pool of `num_blocks` blocks.

    `num_blocks` counts vLLM's null block, which holds nothing. None means off.
    """
    if settings is not None and settings.question_tokens:
        n = max(0, n - settings.question_tokens)
    selected = tsp_selected_tokens(n, block_tokens, settings) if settings is not None else None
    alone = Plan(n, block_tokens, 0, None, None, selected)
    if settings is None or not settings.wishes_compression():
        return alone
    usable = num_blocks - 1
    full = n // block_tokens
    kept = blocks_to_keep(n, block_tokens, settings)
    if selected is not None:
        kept = min(kept, selected // block_tokens)
    continual = settings.continual and not settings.force_arena
    slack = settings.continual_slack_blocks if continual else None
    if settings.force_arena and full:
        kept = min(kept, full)
    elif kept >= full:
        if slack is None:
            return alone
        point = (kept + slack) * block_tokens
        grows = Plan(n, block_tokens, kept, point, slack)
        return grows if grows.peak_blocks(point) < usable else alone
    # The next token may need its block before the step that compresses is processed.
    if full == 0 or ceil_div(n + 1, block_tokens) + kept > usable:
        return alone
    if slack is not None and 2 * kept + slack + 1 > usable:
        slack = None
    return Plan(n, block_tokens, kept, n, slack, selected)


def held_share(plan: Plan) -> float:
    """`(K*B + t) / n` right after prefill: what every comparison between policies uses."""
    n = plan.prompt_tokens
    if n == 0 or plan.first_point != n:
        return 1.0
    return (plan.arena_blocks * plan.block_tokens + n % plan.block_tokens) / n
