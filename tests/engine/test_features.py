"""What requests may ask for beside compression works with it."""

from random import Random

import pytest
from engine import dense
from engine.engines import (
    answers,
    ask,
    assert_all_free,
    engine,
    free_blocks,
    greedy,
    prompt,
    steps,
)

pytestmark = pytest.mark.engine


def test_more_logprobs_are_those_of_the_kept_tokens():
    llm = engine({"rate": 4}, step_tokens=256)
    params = greedy(20)
    params.logprobs = 12
    watch = dense.Watch(llm)
    llm.llm_engine.add_request("p", {"prompt_token_ids": prompt(Random(1), 300)}, params)
    done = [output for finished in steps(llm, watch) for output in finished]
    (answer,) = answers(done)
    assert all(len(step) >= 12 for step in answer.logprobs)
    dense.check(answer, watch.of("p"))


def test_prompt_logprobs_see_the_whole_prompt():
    rng = Random(2)
    ids = [prompt(rng, n) for n in (40, 200, 500)]
    params = greedy(3, prompt_logprobs=1)

    def of(llm):
        outputs = llm.generate([{"prompt_token_ids": p} for p in ids], params, use_tqdm=False)
        return [
            [{t: q.logprob for t, q in step.items()} for step in output.prompt_logprobs[1:]]
            for output in outputs
        ]

    plain, compressed = of(engine()), of(engine({"rate": 8}, step_tokens=256))
    for mine, theirs in zip(compressed, plain, strict=True):
        assert len(mine) == len(theirs)
        for got, want in zip(mine, theirs, strict=True):
            for token in got.keys() & want.keys():
                assert abs(got[token] - want[token]) < 1e-4


def test_stop_strings_and_stop_tokens_end_a_compressed_request():
    llm = engine({"rate": 4}, step_tokens=256)
    initial, ids = free_blocks(llm), prompt(Random(3), 310)
    (whole,) = ask(llm, [ids], greedy(60))
    stop = whole.text[20:24]
    assert len(stop) == 4
    (cut,) = ask(llm, [ids], greedy(60, stop=[stop]))
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.tokens == whole.tokens[: len(cut.tokens)]
    token = whole.tokens[10]
    (cut,) = ask(llm, [ids], greedy(60, stop_token_ids=[token]))
    assert cut.tokens == whole.tokens[: whole.tokens.index(token) + 1]
    assert_all_free(llm, initial)


def test_a_request_that_only_wants_one_token_is_done_before_its_sources_are_freed():
    llm = engine({"rate": 4}, step_tokens=256)
    initial = free_blocks(llm)
    rng = Random(4)
    said = ask(llm, [prompt(rng, n) for n in (64, 96, 320, 321)], greedy(1))
    assert [len(answer.tokens) for answer in said] == [1, 1, 1, 1]
    assert_all_free(llm, initial)


def test_cached_prefixes_can_be_dropped_while_requests_are_compressed():
    llm = engine({"rate": 4}, step_tokens=256)
    initial, ids = free_blocks(llm), prompt(Random(5), 320)
    (first,) = ask(llm, [ids], greedy(30))
    assert llm.reset_prefix_cache()
    (again,) = ask(llm, [ids], greedy(30))
    assert again.cached_tokens == 0 and again.tokens == first.tokens
    assert_all_free(llm, initial)
