"""A request's knobs are checked at admission, each engine's by its own settings."""

import math
from types import SimpleNamespace as Bag

import pytest
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.input_processor import InputProcessor

from vllm_kvcompress.plugin import register
from vllm_kvcompress.serving.metrics import PREFIX, refusals_counter
from vllm_kvcompress.serving.validation import RequestCheck, refuse_knobs_of_beam_search

MODEL = "vllm_kvcompress/demo_model"


STORE = Bag(kv_connector="CacheGenConnector")


def check_of(
    raw=True, max_model_len=4096, then=lambda params: None, name="m", store=None
) -> RequestCheck:
    config = Bag(
        additional_config={"kv_compress": raw},
        model_config=Bag(max_model_len=max_model_len, served_model_name=name),
        kv_transfer_config=store,
    )
    return RequestCheck(config, then)


def test_good_knobs_and_those_of_others_pass_on_to_vllm() -> None:
    seen = []
    check = check_of(then=seen.append)
    good = [
        None,
        {},
        {"other_extension": [1], "kv_compression_of_another": "x"},
        {"kv_compress": "off"},
        {"kv_compress": "snapkv", "kv_compress_rate": 1024},
        {"kv_compress_budget": 4096.0},
        {"kv_compress": "windowkv", "kv_compress_task": "auto"},
    ]
    for xargs in good:
        check(SamplingParams(extra_args=xargs))
    assert [params.extra_args for params in seen] == good
    assert not check.refusals


@pytest.mark.parametrize(
    ("xargs", "reason"),
    [
        ({"kv_compress": "nope"}, "unknown_preset"),
        ({"kv_compress": True}, "unknown_preset"),
        ({"kv_compress_rate": math.nan}, "bad_rate"),
        ({"kv_compress_rate": True}, "bad_rate"),
        ({"kv_compress_budget": 4097}, "bad_budget"),
        ({"kv_compress_rate": 2, "kv_compress_budget": 9}, "rate_and_budget"),
        ({"kv_compress_task": "summary"}, "bad_task"),
        ({"kv_compress_" + "x" * 100_000: 1}, "unknown_knob"),
    ],
)
def test_a_bad_knob_is_a_400_and_a_value_error_and_is_counted(xargs, reason) -> None:
    seen = []
    check = check_of(then=seen.append, name=f"counted-{reason}-{len(str(xargs))}")
    with pytest.raises(VLLMValidationError) as caught:
        check(SamplingParams(extra_args=xargs))
    error = caught.value
    assert isinstance(error, ValueError)
    assert error.parameter == next(iter(xargs))[:80] and len(str(error)) < 600
    assert seen == [] and check.refusals == {reason: 1}
    counted = refusals_counter().labels(check._model_name, reason)
    assert counted._value.get() == 1 and PREFIX.startswith("vllm:")


@pytest.mark.parametrize("compresses", [True, None], ids=["compressing", "store only"])
def test_knobs_of_the_store_are_checked_with_and_without_compression(compresses) -> None:
    seen, name = [], f"store-{compresses}"
    check = check_of(compresses, then=seen.append, name=name, store=STORE)
    check(SamplingParams(extra_args={"cachegen_level": 2}))
    check(SamplingParams(extra_args={"cachegen_ttft_ms": 300}))
    with pytest.raises(VLLMValidationError, match="cachegen_level=9 is not allowed") as caught:
        check(SamplingParams(extra_args={"cachegen_level": 9}))
    assert caught.value.parameter == "cachegen_level"
    assert len(seen) == 2 and check.refusals == {"bad_level": 1}


def test_knobs_of_the_store_are_refused_without_one() -> None:
    check = check_of(name="no-store")
    with pytest.raises(VLLMValidationError, match="this server has no store: start it with"):
        check(SamplingParams(extra_args={"cachegen_level": 2}))
    assert check.refusals == {"no_store": 1}


def test_prompt_logprobs_and_propagation_exclude_each_other() -> None:
    seen = []
    check = check_of({"preset": "fastkv"}, then=seen.append, name="prompt-logprobs")
    check(SamplingParams(prompt_logprobs=1, extra_args={"kv_compress": "snapkv"}))
    check(SamplingParams(logprobs=1))
    with pytest.raises(VLLMValidationError, match=r"prompt_logprobs=0 is not allowed.*'fastkv'"):
        check(SamplingParams(prompt_logprobs=0))
    assert len(seen) == 2 and check.refusals == {"tsp_prompt_logprobs": 1}


def test_a_beam_search_takes_no_knobs() -> None:
    refuse_knobs_of_beam_search(None)
    refuse_knobs_of_beam_search({"other": 1, "kv_compressor": 2})
    for knobs in (
        {"kv_compress": "off"},
        {"kv_compress_rate": 8},
        {"kv_compress_x": 1},
        {"cachegen_level": 2},
    ):
        with pytest.raises(VLLMValidationError, match="no effect on a beam search"):
            refuse_knobs_of_beam_search({"other": 1, **knobs})


def test_two_engines_of_a_process_have_their_own_settings() -> None:
    register()

    def processor(max_model_len, **additional) -> InputProcessor:
        args = EngineArgs(
            model=MODEL, max_model_len=max_model_len, enforce_eager=True, **additional
        )
        return InputProcessor(args.create_engine_config())

    own = {"name": "own", "scorer": {"name": "random"}, "allocator": {"name": "uniform"}}
    first = processor(4096, additional_config={"kv_compress": {"presets": {"own": own}}})
    second = processor(512, additional_config={"kv_compress": True})
    plain = processor(512)
    budget = SamplingParams(extra_args={"kv_compress": "own", "kv_compress_budget": 1000})
    first.validate_logits_processors_params(budget)
    with pytest.raises(ValueError, match="unknown preset 'own'"):
        second.validate_logits_processors_params(budget)
    with pytest.raises(ValueError, match="from 1 to 512"):
        second.validate_logits_processors_params(
            SamplingParams(extra_args={"kv_compress_budget": 1000})
        )
    plain.validate_logits_processors_params(budget)
