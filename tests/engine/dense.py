"""An independent judge: transformers' model in float64 with a mask per layer and head.

What a request kept is not asked from the engine's books. The keys and values in its arena pages
are matched with those that the reference computes, so that a wrong page, a wrong token or a
wrong element is seen as well.
"""

from collections import defaultdict
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from engine.engines import (
    BLOCK,
    DEMO_MODEL,
    Answer,
    answers,
    compressor_of,
    scheduler_of,
    steps,
)
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM

SAME = 1e-4  # log-probabilities, relative where they exceed 1
SAME_ELEMENT = 1e-3  # of keys and values, which reach 20 and carry three layers of rounding
_seen: dict[str, Any] = {
    "model": DEMO_MODEL,
    "masks": None,
    "queries": {},
    "keys": {},
    "values": {},
}


def _masked_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: Any, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """`query [1, Hq, T, D]`, `key, value [1, H, T, D]`; masks `[L, H, T, T]`, True is read."""
    layer, heads = module.layer_idx, key.shape[1]
    _seen["keys"][layer], _seen["values"][layer] = key[0].float(), value[0].float()
    grouped = query[0].unflatten(0, (heads, -1))  # [H, G, T, D]
    _seen["queries"][layer] = grouped.float()
    logits = (grouped * scaling) @ key[0][:, None].transpose(-1, -2)
    logits = logits.masked_fill(~_seen["masks"][layer][:, None], -torch.inf)
    out = logits.softmax(dim=-1) @ value[0][:, None]
    return out.flatten(0, 1).transpose(0, 1)[None], None


def _model() -> Any:
    return _loaded(_seen["model"])


@contextmanager
def judging(path: str) -> Iterator[None]:
    """Inside, the judge is the checkpoint at `path`, not the demo model."""
    before, _seen["model"] = _seen["model"], path
    try:
        yield
    finally:
        _seen["model"] = before


@cache
def _loaded(path: str) -> Any:
    AttentionInterface.register("per_head_masks", _masked_attention)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    model.set_attn_implementation("per_head_masks")
    return model.eval()


@torch.inference_mode()
def forward(tokens: list[int], masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities `[T, V]`, keys and values `[L, H, T, D]`; `masks [L, H, T, T]`."""
    _seen["masks"] = masks
    logits = _model()(torch.tensor([tokens]), use_cache=False).logits[0]
    layers = range(_model().config.num_hidden_layers)
    keys = torch.stack([_seen["keys"][layer] for layer in layers])
    values = torch.stack([_seen["values"][layer] for layer in layers])
    return logits.log_softmax(dim=-1), keys, values


def causal(tokens: int) -> Tensor:
    config = _model().config
    square = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    return square.expand(config.num_hidden_layers, config.num_key_value_heads, -1, -1).clone()


@dataclass
class Arena:
    """What the pages of a freshly compressed request hold: `[L][H]` of `[kept, D]`."""

    point: int
    tail_start: int
    keys: list[list[Tensor]]
    values: list[list[Tensor]]


class Watch:
    """Looks into the pool after every step and keeps what new arenas hold."""

    def __init__(self, llm: Any) -> None:
        self._compressor = compressor_of(llm)
        self._runs: dict[str, int] = {}
        self.arenas: dict[str, list[Arena]] = defaultdict(list)

    def __call__(self) -> None:
        """To be called after each engine step, before the next."""
        compressor = self._compressor
        runs: dict[str, int] = {}
        for name in compressor.tables.requests():
            slot = compressor.tables.slot(name)
            tail_start = int(compressor.tables._tail_start[slot])
            if self._runs.get(name) != tail_start:
                self.arenas[name].append(self._look(name, tail_start))
            runs[name] = tail_start
        self._runs = runs

    def of(self, request_id: str) -> list[Arena]:
        """The arenas of a request, oldest first; vLLM may have added to its name."""
        names = [n for n in self.arenas if n == request_id or n.startswith(request_id + "-")]
        return [arena for name in names for arena in self.arenas[name]]

    def _look(self, name: str, tail_start: int) -> Arena:
        pool, plan = self._compressor.pool, self._compressor._requests[name].plan
        counts, ids = self._compressor.tables.arena(name)
        first = plan.first_point or plan.prompt_tokens
        point = first if tail_start == first // BLOCK * BLOCK else tail_start
        keys, values = [], []
        for layer in range(pool.num_layers):
            pages = [
                ids[layer, head, : counts[layer, head]][None] for head in range(pool.num_heads)
            ]
            keys.append([pool.keys(p)[0].clone() for p in pages])
            values.append([pool.values(p)[0].clone() for p in pages])
        return Arena(point, tail_start, keys, values)


def watched(
    llm: Any,
    requests: list[tuple[list[int], Any]],
    preempt_at: Container[int] = (),
    arrive_every: int | None = None,
) -> list[tuple[Answer, list[Arena]]]:
    """Put `(prompt, params)` pairs; each one's answer and the arenas it went through.

    preempt_at: the steps after which all that runs is preempted.
    arrive_every: steps between two arrivals; None: all come at once.
    """
    watch, done, waiting = Watch(llm), {}, list(enumerate(requests))

    def arrive(count: int) -> None:
        for i, (ids, params) in waiting[:count]:
            llm.llm_engine.add_request(f"q{i}", {"prompt_token_ids": ids}, params)
        del waiting[:count]

    arrive(1 if arrive_every else len(requests))
    for step, finished in enumerate(steps(llm, watch), start=1):
        if step in preempt_at:
            scheduler_of(llm).reset_prefix_cache(reset_running_requests=True)
        if arrive_every and step % arrive_every == 0:
            arrive(1)
        done.update({output.request_id.split("-")[0]: output for output in finished})
    assert not waiting
    names = [f"q{i}" for i in range(len(requests))]
    return list(zip(answers([done[n] for n in names]), map(watch.of, names), strict=True))


def recover(arena: Arena, keys: Tensor, values: Tensor) -> list[list[list[int]]]:
    """Positions kept per layer and head, by matching pages with `keys, values [L, H, n, D]`."""
    kept = []
    for layer, heads in enumerate(arena.keys):
        row = []
        for head, mine in enumerate(heads):
            theirs = keys[layer, head, : arena.point]
            gaps = torch.cdist(mine, theirs, compute_mode="donot_use_mm_for_euclid_dist")
            nearest = gaps.argmin(dim=1)
            where = f"layer {layer} head {head} at {arena.point}"
            worst = (mine - theirs[nearest]).abs().max()
            assert worst < SAME_ELEMENT, (
                f"{where}: a page holds a key {worst:.1e} from any of the prompt's"
            )
            worst = (arena.values[layer][head] - values[layer, head, nearest]).abs().max()
            assert worst < SAME_ELEMENT, f"{where}: a value is {worst:.1e} off the one of its key"
            positions = nearest.tolist()
            assert positions == sorted(set(positions)), f"{where}: tokens twice or out of order"
            assert positions[-1] < arena.tail_start, f"{where}: a token of the tail in the arena"
            row.append(positions)
        kept.append(row)
    return kept


def propagated(prompt: list[int], layer: int, count: int, window: int) -> list[int]:
    """Positions that go on above `layer`, by FastKV's rule: attention of the last queries,
    max-pool 7, summed over all heads."""
    n = len(prompt)
    forward(prompt, causal(n))
    queries, keys = _seen["queries"][layer][:, :, -window:], _seen["keys"][layer]
    logits = queries @ keys[:, None].transpose(-1, -2) * keys.shape[-1] ** -0.5
    late = torch.arange(n) > torch.arange(n - window, n)[:, None]
    mass = logits.masked_fill(late, -torch.inf).softmax(dim=-1).sum(dim=2)[..., : n - window]
    pooled = torch.nn.functional.max_pool1d(mass.flatten(0, 1), 7, 1, 3).sum(dim=0)
    last = max(window, n % BLOCK)
    order = pooled[: n - last].argsort(descending=True, stable=True)
    best = order[: count - last].tolist()
    return sorted(best) + list(range(n - last, n))


def selected_masks(tokens: int, prompt_tokens: int, layer: int, kept: list[int]) -> Tensor:
    """Causal masks in which the layers above `layer` see only `kept` of the prompt."""
    masks = causal(tokens)
    gone = [p for p in range(prompt_tokens) if p not in set(kept)]
    masks[layer + 1 :, :, :, gone] = False
    return masks | torch.eye(tokens, dtype=torch.bool)  # what nobody reads must not be NaN


def check(
    answer: Answer, arenas: list[Arena], tolerance: float = SAME, masks: Tensor | None = None
) -> float:
    """Compare an answer's log-probabilities with dense attention over what was kept.

    A request may be preempted and compressed again: then the same tokens must be kept.
    `masks`: what there was to attend to before anything was evicted; all, if left out.

    Returns:
        The largest difference met.
    """
    tokens = answer.prompt + answer.tokens
    masks = causal(len(tokens)) if masks is None else masks
    by_point: dict[int, list[list[list[int]]]] = {}
    logprobs, keys, values = forward(tokens, masks)
    for arena in arenas:
        again = by_point.get(arena.point)
        if again is None and by_point and arena.point < max(by_point):
            raise AssertionError(f"compressed at {arena.point} only after {max(by_point)}")
        kept = recover(arena, keys, values)
        if again is not None:
            assert kept == again, f"other tokens were kept after a preemption, at {arena.point}"
            continue
        by_point[arena.point] = kept
        for layer, row in enumerate(kept):
            for head, positions in enumerate(row):
                later = masks[layer, head, arena.point :]
                later[:, : arena.tail_start] = False
                later[:, positions] = True
        logprobs, keys, values = forward(tokens, masks)
    worst = 0.0
    for i, said in enumerate(answer.logprobs):
        row = logprobs[len(answer.prompt) + i - 1]
        for token, logprob in said.items():
            gap = abs(float(row[token]) - logprob)
            worst = max(worst, gap)
            assert gap <= tolerance * max(1.0, -logprob), (
                f"prompt of {len(answer.prompt)}: token {i} has log-probability {logprob:.6f}, "
                f"dense attention over the kept tokens gives {float(row[token]):.6f}"
            )
    return worst


def full_attention_gap(answer: Answer) -> float:
    """How far the answer is from attention to everything: shows that a check has teeth."""
    tokens = answer.prompt + answer.tokens
    logprobs, _, _ = forward(tokens, causal(len(tokens)))
    return max(
        abs(float(logprobs[len(answer.prompt) + i - 1][token]) - logprob)
        for i, said in enumerate(answer.logprobs)
        for token, logprob in said.items()
    )
