"""Whatever a user types is either understood or refused in one line that says how to mend it."""

import math

import pytest

from vllm_kvcompress.accounting import Settings
from vllm_kvcompress.config import EngineConfig, parse_engine_config
from vllm_kvcompress.knobs import KnobError
from vllm_kvcompress.presets import DEFAULT_PRESET, Preset, load_preset, shipped_presets

MAX_TOKENS = 4096
NOVEL = "x" * 100_000

BAD_KNOBS = {
    "unknown preset": ({"kv_compress": "nope"}, "kv_compress", "kv-compress"),
    "preset of 100 KB": ({"kv_compress": NOVEL}, "kv_compress", "100000 characters"),
    "preset as a number": ({"kv_compress": 8}, "kv_compress", "known: off"),
    "preset as a bool": ({"kv_compress": True}, "kv_compress", "known: off"),
    "preset as a list": ({"kv_compress": ["snapkv"]}, "kv_compress", "known: off"),
    "preset as None": ({"kv_compress": None}, "kv_compress", "known: off"),
    "rate as a string": ({"kv_compress_rate": "8"}, "kv_compress_rate", "from 1"),
    "rate of 100 KB": ({"kv_compress_rate": NOVEL}, "kv_compress_rate", "100000 characters"),
    "rate as a list": ({"kv_compress_rate": [8]}, "kv_compress_rate", "from 1"),
    "rate as a bool": ({"kv_compress_rate": True}, "kv_compress_rate", "from 1"),
    "rate as None": ({"kv_compress_rate": None}, "kv_compress_rate", "from 1"),
    "rate NaN": ({"kv_compress_rate": math.nan}, "kv_compress_rate", "from 1"),
    "rate infinite": ({"kv_compress_rate": math.inf}, "kv_compress_rate", "to 1024"),
    "rate minus infinite": ({"kv_compress_rate": -math.inf}, "kv_compress_rate", "from 1"),
    "rate below 1": ({"kv_compress_rate": 0.99}, "kv_compress_rate", "from 1"),
    "rate 0": ({"kv_compress_rate": 0}, "kv_compress_rate", "from 1"),
    "rate too high": ({"kv_compress_rate": 1024.5}, "kv_compress_rate", "to 1024"),
    "rate past every float": ({"kv_compress_rate": 10**400}, "kv_compress_rate", "to 1024"),
    "budget as a string": ({"kv_compress_budget": "64"}, "kv_compress_budget", "to 4096"),
    "budget as a list": ({"kv_compress_budget": [64]}, "kv_compress_budget", "to 4096"),
    "budget as a bool": ({"kv_compress_budget": True}, "kv_compress_budget", "to 4096"),
    "budget as None": ({"kv_compress_budget": None}, "kv_compress_budget", "to 4096"),
    "budget NaN": ({"kv_compress_budget": math.nan}, "kv_compress_budget", "to 4096"),
    "budget infinite": ({"kv_compress_budget": math.inf}, "kv_compress_budget", "to 4096"),
    "budget 0": ({"kv_compress_budget": 0}, "kv_compress_budget", "from 1"),
    "budget negative": ({"kv_compress_budget": -64}, "kv_compress_budget", "from 1"),
    "budget fractional": ({"kv_compress_budget": 64.5}, "kv_compress_budget", "whole number"),
    "budget past the context": ({"kv_compress_budget": 4097}, "kv_compress_budget", "to 4096"),
    "question as a string": ({"kv_compress_question": "8"}, "kv_compress_question", "from 0"),
    "question NaN": ({"kv_compress_question": math.nan}, "kv_compress_question", "to 4096"),
    "question infinite": ({"kv_compress_question": math.inf}, "kv_compress_question", "to 4096"),
    "question negative": ({"kv_compress_question": -1}, "kv_compress_question", "from 0"),
    "question fractional": ({"kv_compress_question": 1.5}, "kv_compress_question", "whole"),
    "question past the context": ({"kv_compress_question": 4097}, "kv_compress_question", "4096"),
    "budget past every float": ({"kv_compress_budget": 10**400}, "kv_compress_budget", "to 4096"),
    "both at once": (
        {"kv_compress_rate": 8, "kv_compress_budget": 64},
        "kv_compress_rate and kv_compress_budget exclude each other",
        "give one",
    ),
    "unknown task": (
        {"kv_compress": "windowkv", "kv_compress_task": "qa"},
        "kv_compress_task",
        "localization, aggregation, auto",
    ),
    "task as None": (
        {"kv_compress": "windowkv", "kv_compress_task": None},
        "kv_compress_task",
        "auto",
    ),
    "task as a list": ({"kv_compress_task": ["auto"]}, "kv_compress_task", "auto"),
    "task of 100 KB": ({"kv_compress_task": NOVEL}, "kv_compress_task", "100000 characters"),
    "task of a preset without": ({"kv_compress_task": "auto"}, "kv_compress_task", "windowkv"),
    "unknown knob": ({"kv_compress_ratio": 8}, "kv_compress_ratio", "kv_compress_rate"),
    "knob of 100 KB": ({"kv_compress_" + NOVEL: 8}, "kv_compress_x", "kv_compress_budget"),
    "bad knob beside off": (
        {"kv_compress": "off", "kv_compress_rate": "8"},
        "kv_compress_rate",
        "from 1",
    ),
}


@pytest.mark.parametrize(("knobs", "key", "allowed"), BAD_KNOBS.values(), ids=BAD_KNOBS)
def test_a_bad_knob_is_refused_by_name_with_what_is_allowed(knobs, key, allowed) -> None:
    with pytest.raises(ValueError) as caught:
        EngineConfig().request_settings(knobs, MAX_TOKENS)
    said = str(caught.value)
    assert key in said and allowed in said
    assert "\n" not in said and len(said) < 400


@pytest.mark.parametrize(
    ("knobs", "changes"),
    [
        (None, {}),
        ({}, {}),
        ({"other_extension": [1, 2], "kv_compressor": 3, "kv": None}, {}),
        ({"kv_compress_rate": 2}, {"rate": 2.0}),
        ({"kv_compress_rate": 1}, {"rate": 1.0}),
        ({"kv_compress_rate": 1024}, {"rate": 1024.0}),
        ({"kv_compress_budget": 1}, {"budget_tokens": 1}),
        ({"kv_compress_budget": 64.0}, {"budget_tokens": 64}),
        ({"kv_compress_question": 9.0}, {"question_tokens": 9}),
        ({"kv_compress_budget": MAX_TOKENS}, {"budget_tokens": MAX_TOKENS}),
    ],
)
def test_good_knobs_change_the_default_preset_and_other_keys_pass(knobs, changes) -> None:
    got = EngineConfig().request_settings(knobs, MAX_TOKENS)
    assert got == shipped_presets()[DEFAULT_PRESET].settings(**changes)


def test_a_request_chooses_its_preset_and_off_means_off() -> None:
    config = EngineConfig()
    snapkv = shipped_presets()["snapkv"]
    assert config.request_settings({"kv_compress": "snapkv"}, 99) == snapkv.settings()
    assert config.request_settings({"kv_compress": "off"}, 99) is None
    asleep = EngineConfig(preset="off")
    assert asleep.request_settings({}, 99) is None
    assert asleep.request_settings({"kv_compress": "snapkv"}, 99) == snapkv.settings()


def test_cachegen_stands_where_a_preset_may_and_compresses_nothing() -> None:
    config = parse_engine_config("cachegen")
    assert config.cachegen == {} and config.asked_presets() == {}
    assert config.request_settings({}, 99) is None
    assert config.request_settings({"kv_compress": "snapkv"}, 99).preset == "snapkv"
    assert (
        parse_engine_config({"cachegen": {}}).request_settings({"kv_compress": "cachegen"}, 9)
        is None
    )
    with pytest.raises(KnobError, match="no store: start it with") as caught:
        EngineConfig().request_settings({"kv_compress": "cachegen"}, 99)
    assert caught.value.reason == "no_store"
    with pytest.raises(ValueError, match="cannot name a preset"):
        Preset(name="cachegen", scorer={"name": "a"}, allocator={"name": "b"})


def test_a_rate_overrides_the_budget_of_a_preset() -> None:
    small = Preset(
        name="small", scorer={"name": "random"}, allocator={"name": "uniform"}, budget_tokens=64
    )
    config = EngineConfig(preset="small", presets={"small": small})
    assert config.request_settings({}, 4096).budget_tokens == 64
    got = config.request_settings({"kv_compress_rate": 2}, 4096)
    assert (got.rate, got.budget_tokens) == (2.0, None)
    started = parse_engine_config({"preset": "fastkv-constant", "rate": 4})
    got = started.request_settings({}, 4096)
    assert (got.rate, got.budget_tokens) == (4.0, None)


@pytest.mark.parametrize(
    "raw",
    [
        True,
        {},
        "snapkv",
        {"preset": "snapkv", "rate": 4},
        {"preset": "kv-compress", "scorer": {"name": "keydiff"}, "window_tokens": 1},
        {"preset": "off"},
        {"test_force_arena": True},
    ],
)
def test_engine_config_survives_the_trip_to_another_process(raw) -> None:
    config = parse_engine_config(raw)
    assert parse_engine_config(config.to_dict()) == config


def test_fields_beside_the_preset_override_it() -> None:
    config = parse_engine_config({"preset": "snapkv", "rate": 4, "sink_tokens": 2})
    got = config.request_settings({}, 4096)
    assert isinstance(got, Settings)
    assert (got.preset, got.rate, got.sink_tokens, got.window_tokens) == ("snapkv", 4.0, 2, 64)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (False, "not False"),
        (None, "not None"),
        (8, "not 8"),
        ([NOVEL], "characters"),
        ("nope", "unknown preset 'nope'; known: off, cachegen, adakv"),
        (NOVEL, "100000 characters"),
        ({"preset": 3}, "preset: "),
        ({"preset": "snapkv", "rat": 4}, "unknown key 'rat'; known: .*rate"),
        ({"preset": "snapkv", "rate": "4"}, "rate: "),
        ({"preset": "snapkv", "rate": math.nan}, "rate: "),
        ({"rate": 4, "budget_tokens": 64}, "rate and budget_tokens exclude each other"),
        ({"preset": "snapkv", "rate": 0.5}, "rate: .*greater than or equal to 1"),
        ({"preset": "snapkv", "window_tokens": 0}, "window_tokens: "),
        ({"preset": "snapkv", "window_tokens": 2.5}, "window_tokens: "),
        ({"preset": "snapkv", "continual": "yes"}, "continual: "),
        ({"preset": "off", "rate": 4}, "rate would override a preset, but the preset is 'off'"),
        ({"test_force_arena": 1}, "test_force_arena: "),
        ({"preset": "snapkv", "rate": 4, "name": "mine"}, "unknown key 'name'; known: .*rate"),
        (
            {"preset": "x", "presets": {"x": shipped_presets()["snapkv"].model_dump()}},
            "'x' holds a preset whose name is 'snapkv'",
        ),
    ],
)
def test_a_bad_engine_config_is_refused_in_one_line(raw, says) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        parse_engine_config(raw)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: [", "is not valid YAML"),
        ("just words", "is no preset: a mapping"),
        ("name: x", "is no preset: scorer: "),
        ("name: OFF\nscorer: {name: a}\nallocator: {name: b}", "name: "),
        ("name: off-road\nscorer: {name: a}\nallocator: {}", "allocator.name: "),
        ("name: 'off'\nscorer: {name: a}\nallocator: {name: b}", "cannot name a preset"),
        ("name: x\nscorer: {name: a}\nallocator: {name: b}\nrat: 4", "rat: "),
        ("1: 2", "is no preset"),
    ],
)
def test_a_bad_preset_file_is_refused_in_one_line(tmp_path, text, says) -> None:
    path = tmp_path / "preset.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=says) as caught:
        load_preset(path)
    assert "preset.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_a_preset_file_that_cannot_be_read_is_refused(tmp_path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for name, says in (
        ("missing.yaml", "No such file"),
        ("binary.yaml", "not text"),
        ("", "irect"),
        ("/dev/zero", "more than"),
    ):
        with pytest.raises(ValueError, match=f"cannot read preset file .*{says}"):
            load_preset(tmp_path / name)


def test_presets_named_in_the_config_are_known_to_requests() -> None:
    own = Preset(name="own", scorer={"name": "random"}, allocator={"name": "uniform"}, rate=3)
    config = EngineConfig(presets={"own": own})
    assert config.request_settings({"kv_compress": "own"}, 99).rate == 3


def test_the_class_of_a_task_is_the_requests_own():
    config = EngineConfig(preset="windowkv")
    settings = [
        config.request_settings(knobs, MAX_TOKENS)
        for knobs in (
            {"kv_compress_task": "aggregation"},
            {"kv_compress_task": "localization"},
            {"kv_compress_task": "auto"},
            None,
            {"kv_compress": "snapkv"},
        )
    ]
    assert [s.task for s in settings] == ["aggregation", *["localization"] * 3, None]
    assert [s.window_tokens for s in settings] == [16, 32, 32, 32, 64]
    unknown = [None, {}, {"kv_compress_task": "auto"}]
    told = [{"kv_compress_task": "aggregation"}, {"kv_compress": "snapkv"}, {"kv_compress": "off"}]
    assert all(map(config.wants_task, unknown)) and not any(map(config.wants_task, told))
    assert not config.wants_task({"kv_compress": ["windowkv"]})
