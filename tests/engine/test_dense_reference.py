"""What a compressed request says is what dense attention over its kept tokens says.

See `dense.py`: the kept tokens are read out of the pages themselves.
"""

from math import ceil
from random import Random

import pytest
from engine import dense
from engine.dense import watched
from engine.engines import (
    BLOCK,
    answers,
    assert_all_free,
    compressor_of,
    counted,
    engine,
    free_blocks,
    greedy,
    prompt,
    scheduler_of,
    steps,
)
from vllm.sampling_params import RequestOutputKind

from vllm_kvcompress.presets import shipped_presets

pytestmark = pytest.mark.engine
LENGTHS = [20, 31, 32, 33, 64, 65, 320, 321, 500, 735]
PRESET = shipped_presets()["kv-compress"]
PRESETS = "kv-compress-paper snapkv adakv pyramidkv windowkv streaming-llm keydiff random".split()


def kept_tokens(arena):
    return sum(len(keys) for heads in arena.keys for keys in heads)


@pytest.mark.parametrize("rate", [2, 4, 8, 16])
def test_logprobs_equal_dense_attention_over_the_kept_tokens(rate):
    llm = engine({"rate": 8}, step_tokens=256)
    initial, pool = free_blocks(llm), compressor_of(llm).pool
    rng = Random(rate)
    knobs = {"kv_compress_rate": rate}
    requests = [(prompt(rng, n), greedy(45, knobs)) for n in LENGTHS]
    gaps = []
    for answer, arenas in watched(llm, requests):
        n = len(answer.prompt)
        recent = max(0, PRESET.recent_tokens - n % BLOCK)
        protected = ceil((PRESET.sink_tokens + recent) / BLOCK)
        blocks = max(1, protected, ceil((n / rate - n % BLOCK) / BLOCK))
        if blocks >= n // BLOCK:
            assert not arenas, f"{n} tokens are compressed at rate {rate}"
        else:
            assert [arena.point for arena in arenas] == [n]
            assert kept_tokens(arenas[0]) == blocks * BLOCK * pool.num_layers * pool.num_heads
            gaps.append(dense.full_attention_gap(answer))
        dense.check(answer, arenas)
    assert max(gaps) > 0.01, f"attention to everything is as close ({gaps}): the check has no teeth"
    assert_all_free(llm, initial)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_attends_to_what_it_kept(preset):
    llm = engine({"rate": 8}, step_tokens=256)
    rng = Random(preset)
    knobs = {"kv_compress": preset, "kv_compress_rate": 3}
    requests = [(prompt(rng, n), greedy(40, knobs)) for n in (288, 450)]
    for answer, arenas in watched(llm, requests):
        assert [arena.point for arena in arenas] == [len(answer.prompt)]
        dense.check(answer, arenas)


@pytest.mark.parametrize(
    ("preset", "step_tokens"),
    [("kv-compress", 1024), ("kv-compress", 7), ("snapkv", 256), ("snapkv", 7), ("keydiff", 1024)],
)
def test_a_question_unseen_attends_to_what_the_context_kept_without_it(preset, step_tokens):
    """`kv_compress_question`: compressed where the context ends, the question comes after."""
    llm = engine({"rate": 8}, step_tokens=step_tokens)
    initial, rng = free_blocks(llm), Random(9)
    cases = [(320, 20), (321, 33), (300, 12), (290, 1), (300, 299), (300, 300)]
    requests = []
    for n, question in cases:
        knobs = {"kv_compress": preset, "kv_compress_rate": 4, "kv_compress_question": question}
        requests.append((prompt(rng, n), greedy(20, knobs)))
    results = watched(llm, requests)
    for (n, question), (answer, arenas) in zip(cases, results, strict=True):
        context = n - question
        assert [arena.point for arena in arenas] == ([context] if context > 2 * BLOCK else [])
        dense.check(answer, arenas)
    assert_all_free(llm, initial)


def test_a_question_unseen_keeps_what_the_context_alone_would_keep():
    llm = engine({"rate": 8}, step_tokens=256)
    ids, knobs = prompt(Random(10), 400), {"kv_compress_rate": 4}
    alone = (ids[:370], greedy(5, knobs))
    asked = (ids, greedy(5, {**knobs, "kv_compress_question": 30}))
    (_, (of_alone,)), (_, (of_asked,)) = watched(llm, [alone, asked])
    _, keys, values = dense.forward(ids, dense.causal(len(ids)))
    assert dense.recover(of_alone, keys, values) == dense.recover(of_asked, keys, values)


def test_chunks_smaller_than_the_window_keep_the_same_tokens():
    rng = Random(5)
    requests = [
        (prompt(rng, n), greedy(20, {"kv_compress": preset, "kv_compress_rate": 4}))
        for n, preset in [(150, "kv-compress"), (200, "kv-compress-paper"), (288, "kv-compress")]
    ]
    whole = watched(engine({"rate": 8}, step_tokens=1024), requests)
    small = watched(engine({"rate": 8}, step_tokens=7), requests)
    for (answer, arenas), (once, expected) in zip(small, whole, strict=True):
        dense.check(answer, arenas)
        assert answer.tokens == once.tokens
        _, keys, values = dense.forward(answer.prompt, dense.causal(len(answer.prompt)))
        assert dense.recover(arenas[0], keys, values) == dense.recover(expected[0], keys, values)


def test_preempted_and_resumed_requests_still_attend_to_what_they_kept():
    llm = engine({"rate": 2}, blocks=24, step_tokens=256)
    initial, rng = free_blocks(llm), Random(6)
    requests = [
        (prompt(rng, rng.randint(250, 420)), greedy(200, {"kv_compress_question": 15 * (i % 3)}))
        for i in range(7)
    ]
    with counted(scheduler_of(llm), "_preempt_request") as preempted:
        results = watched(llm, requests, preempt_at=range(90, 20_000, 90))
    assert len(preempted) >= 5, f"only {len(preempted)} preemptions"
    again = [arenas for _, arenas in results if len(arenas) > 1]
    assert again, "no request was compressed twice"
    for answer, arenas in results:
        dense.check(answer, arenas)
    assert_all_free(llm, initial)


@pytest.mark.parametrize(
    "preempt_at", [(), range(37, 20_000, 37)], ids=["undisturbed", "preempted"]
)
def test_continual_compression_attends_to_what_every_recompression_kept(preempt_at):
    llm = engine(
        {"preset": "kv-compress-continual", "rate": 4, "continual_slack_blocks": 2}, step_tokens=256
    )
    llm.reset_prefix_cache()
    initial, rng = free_blocks(llm), Random(7)
    requests = [(prompt(rng, n), greedy(200)) for n in (20, 300, 352)]
    recompressed = 0
    with counted(scheduler_of(llm), "_preempt_request") as preempted:
        results = watched(llm, requests, preempt_at)
    assert len(preempted) >= 3 or not preempt_at, f"only {len(preempted)} preemptions"
    for answer, arenas in results:
        points = sorted({arena.point for arena in arenas})
        first = len(answer.prompt) // BLOCK
        if first > 2:
            later = [(first + 2 * k) * BLOCK for k in range(1, 9)]
            total = len(answer.prompt) + len(answer.tokens) - 1
            assert points == [len(answer.prompt)] + [p for p in later if p <= total]
        recompressed += len(points) > 2
        dense.check(answer, arenas)
    assert recompressed >= 2
    assert_all_free(llm, initial)


def test_samples_of_one_prompt_each_attend_to_what_they_kept():
    """`n > 1`: the samples share hit blocks, and each is compressed by itself."""
    llm = engine({"rate": 4}, step_tokens=256)
    initial, watch = free_blocks(llm), dense.Watch(llm)
    params = greedy(30, output_kind=RequestOutputKind.FINAL_ONLY)
    params.temperature, params.n = 1.0, 3
    ids = prompt(Random(8), 400)
    llm.llm_engine.add_request("many", {"prompt_token_ids": ids}, params)
    done = [output for finished in steps(llm, watch) for output in finished]
    said = answers(done)
    assert len(said) == 3 and len({tuple(a.tokens) for a in said}) > 1
    assert len(watch.arenas) == 3
    names = sorted(watch.arenas)
    assert [name[:2] for name in names] == ["0_", "1_", "2_"]
    for answer, name in zip(said, names, strict=True):
        dense.check(answer, watch.arenas[name])
    assert_all_free(llm, initial)


@pytest.mark.parametrize(("leader", "scored"), [(0, [0, 2]), ("last", [1, 3])])
def test_layers_of_a_group_are_scored_once_and_keep_the_same_tokens(leader, scored):
    own = {"preset": "windowkv", "group_layers": 2, "group_leader": leader, "rate": 4}
    llm = engine(own, step_tokens=256)
    requests = [(prompt(Random(9), n), greedy(8)) for n in (300, 417)]
    judge, passes = compressor_of(llm).judge, []
    score = judge._score_layer

    def recorded(scorer, candidates, layer, window):
        passes.append(layer)
        return score(scorer, candidates, layer, window)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge, "_score_layer", recorded)
        results = watched(llm, requests)
    assert passes == scored * 2
    for answer, (arena,) in results:
        dense.check(answer, [arena])
        n = len(answer.prompt)
        _, keys, values = dense.forward(answer.prompt, dense.causal(n))
        kept = dense.recover(arena, keys, values)
        heads = [[set(positions) for positions in row] for row in kept]
        assert all(tokens == row[0] for row in heads for tokens in row)
        assert heads[0] == heads[1] and heads[2] == heads[3] and heads[0] != heads[2]
