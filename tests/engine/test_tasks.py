"""The class of a request's task is its own, in any batch, told from its prompt where it asks."""

from random import Random

import pytest
from engine.engines import (
    _tokenizer,
    ask,
    compressor_of,
    counted,
    engine,
    greedy,
    prompt,
    scheduler_of,
)
from policy.bert import save_bert

pytestmark = pytest.mark.engine
SUMMARY = "\n\nWrite a summary of the whole text."
QUESTION = "\n\nWhich page mentions the access code?"


def told(llm, prompts, params):
    """Answers, and the class that each compression was done for."""
    compressor = compressor_of(llm)
    with counted(compressor, "_compress") as calls:
        tasks = []
        judge, original = compressor.judge, compressor.judge.policy
        judge.policy = lambda settings: (tasks.append(settings.task), original(settings))[1]
        try:
            said = ask(llm, prompts, params)
        finally:
            del judge.policy
    assert len(calls) == len(prompts)
    return said, set(tasks)


def test_two_classes_in_one_batch_say_what_each_says_alone():
    llm = engine({"preset": "windowkv", "rate": 6}, step_tokens=512)
    ids = prompt(Random(1), 400)
    knobs = [{"kv_compress_task": task} for task in ("localization", "aggregation")]
    alone = []
    for own in knobs:
        said, tasks = told(llm, [ids], greedy(20, own))
        assert tasks == {own["kv_compress_task"]}
        alone += said
    together, tasks = told(llm, [ids, ids], [greedy(20, own) for own in knobs])
    assert tasks == {"localization", "aggregation"}
    assert [a.tokens for a in together] == [a.tokens for a in alone]
    for got, want in zip(together, alone, strict=True):
        for mine, theirs in zip(got.logprobs, want.logprobs, strict=True):
            assert mine.keys() == theirs.keys()
            assert all(abs(mine[t] - theirs[t]) < 1e-4 for t in mine)
    gap = [
        abs(a.logprobs[1].get(t, 0) - p) for a in alone[:1] for t, p in alone[1].logprobs[1].items()
    ]
    assert max(gap) > 1e-4, "the class changes nothing: the test has no teeth"


def test_auto_tells_the_class_of_each_prompt_of_a_batch():
    """One `SamplingParams` for all prompts, as a user writes it."""
    llm = engine({"preset": "windowkv", "rate": 6}, step_tokens=512)
    text = prompt(Random(2), 300)
    prompts = [
        text + _tokenizer().encode(asked, add_special_tokens=False).ids
        for asked in (SUMMARY, QUESTION)
    ]
    params = greedy(4, {"kv_compress_task": "auto"})
    told_of, scheduler = {}, scheduler_of(llm)
    settings_of = scheduler._settings

    def noted(request):
        settings = settings_of(request)
        told_of[request.num_prompt_tokens] = settings.task
        return settings

    scheduler._settings = noted
    try:
        _, tasks = told(llm, prompts, params)
    finally:
        del scheduler._settings
    assert told_of == {len(prompts[0]): "aggregation", len(prompts[1]): "localization"}
    assert tasks == {"localization", "aggregation"}
    assert params.extra_args == {"kv_compress_task": "auto"}, "the user's own object was changed"


def test_a_classifier_named_instead_tells_the_class(tmp_path):
    classifier = save_bert(tmp_path, leaning="aggregation")
    llm = engine({"preset": "windowkv", "rate": 6, "task_classifier": classifier}, blocks=64)
    question = _tokenizer().encode(QUESTION, add_special_tokens=False).ids
    asked = prompt(Random(3), 300) + question
    for knobs in (None, {"kv_compress_task": "auto"}):
        _, tasks = told(llm, [asked], greedy(2, knobs))
        assert tasks == {"aggregation"}
    _, tasks = told(llm, [asked], greedy(2, {"kv_compress_task": "localization"}))
    assert tasks == {"localization"}
