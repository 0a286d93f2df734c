"""The flags are a short way to write `additional_config`, and a mistake is one line."""

import json
from argparse import ArgumentTypeError, Namespace

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_kvcompress.config import parse_engine_config
from vllm_kvcompress.plugin import register
from vllm_kvcompress.presets import DEFAULT_PRESET, shipped_presets
from vllm_kvcompress.serving.flags import MIDDLEWARE, json_mapping, merged, preset_or_file

MODEL = "vllm_kvcompress/demo_model"
OWN = "name: mine\nscorer: {name: random}\nallocator: {name: uniform}\nrate: 3\n"


@pytest.fixture(scope="module")
def parser() -> FlexibleArgumentParser:
    register()
    parser = FlexibleArgumentParser()
    parser.add_argument("--middleware", action="append", default=[])
    return AsyncEngineArgs.add_cli_args(parser)


@pytest.fixture
def engine_args(parser):
    return lambda *argv: AsyncEngineArgs.from_cli_args(parser.parse_args([*argv]))


@pytest.fixture
def own_preset(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(OWN)
    return str(path)


@pytest.mark.parametrize(
    ("argv", "means"),
    [
        (["--kv-compress"], {"preset": DEFAULT_PRESET}),
        (["--kv_compress"], {"preset": DEFAULT_PRESET}),
        (["--kv-compress", "--seed", "0"], {"preset": DEFAULT_PRESET}),
        (["--kv-compress=snapkv"], {"preset": "snapkv"}),
        (["--kv-compress", "off"], {"preset": "off"}),
        (
            ["--kv-compress", "snapkv", "--kv-compress-config", '{"rate": 4}'],
            {"preset": "snapkv", "rate": 4},
        ),
        (
            ["--kv-compress", "snapkv", "--kv-compress-config.rate", "4"],
            {"preset": "snapkv", "rate": 4},
        ),
        (["--kv-compress", "cachegen"], {"preset": "cachegen"}),
        (
            ["--kv-compress", "snapkv", "--kv-compress-store", "redis://host"],
            {"preset": "snapkv", "cachegen": {"store": "redis://host"}},
        ),
    ],
)
def test_the_flag_equals_the_dictionary(engine_args, argv, means) -> None:
    by_flag = engine_args(*argv)
    assert by_flag.additional_config == {"kv_compress": means}
    by_dictionary = engine_args("--additional-config", json.dumps({"kv_compress": means}))
    assert by_flag == by_dictionary


def test_a_file_names_a_preset_of_its_own(engine_args, own_preset) -> None:
    argv = ["--kv-compress", own_preset, "--kv-compress-config", '{"window_tokens": 5}']
    raw = engine_args(*argv).additional_config["kv_compress"]
    settings = parse_engine_config(raw).request_settings({}, 4096)
    assert (settings.preset, settings.rate, settings.window_tokens) == ("mine", 3.0, 5)


def test_both_ways_at_once_must_agree(engine_args, capsys) -> None:
    same = '{"kv_compress": "snapkv", "other": 1}'
    both = engine_args("--kv-compress", "snapkv", "--additional-config", same)
    assert both.additional_config == {"kv_compress": {"preset": "snapkv"}, "other": 1}
    with pytest.raises(SystemExit) as stopped:
        engine_args("--kv-compress", "adakv", "--additional-config", same)
    assert stopped.value.code == 2
    assert "--additional-config differ" in capsys.readouterr().err


def test_with_the_flag_off_nothing_is_set(parser) -> None:
    args = parser.parse_args([])
    engine_args = AsyncEngineArgs.from_cli_args(args)
    assert engine_args == AsyncEngineArgs.from_cli_args.__wrapped__(AsyncEngineArgs, args)
    assert not engine_args.additional_config and args.middleware == []


def test_parsing_twice_changes_nothing(parser) -> None:
    args = parser.parse_args(["--kv-compress"])
    once = AsyncEngineArgs.from_cli_args(args)
    assert AsyncEngineArgs.from_cli_args(args) == once
    assert args.middleware == [MIDDLEWARE]


def test_help_shows_one_more_group(parser) -> None:
    plain = EngineArgs.add_cli_args.__wrapped__(FlexibleArgumentParser())
    ours = EngineArgs.add_cli_args(FlexibleArgumentParser())
    titles = [[group.title for group in one._action_groups] for one in (plain, ours)]
    assert titles[1] == [*titles[0], "KV-Compress"]
    added = set(ours._option_string_actions) - set(plain._option_string_actions)
    assert added == {"--kv-compress", "--kv-compress-config", "--kv-compress-store"}
    FlexibleArgumentParser._search_keyword = "kv-compress"
    try:
        shown = " ".join(ours.format_help().split()).replace("- ", "-")  # broken at hyphens
    finally:
        FlexibleArgumentParser._search_keyword = None
    assert "--kv-compress [PRESET|FILE.yaml]" in shown and "vllm serve MODEL" in shown
    assert all(name in shown for name in shipped_presets())


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("facebook/opt-125m", "write `vllm serve facebook/opt-125m --kv-compress` or `--kv-comp"),
        ("nope", "unknown preset 'nope'; known: off, cachegen, adakv"),
        ("no-such-file.yaml", "cannot read preset file no-such-file.yaml: No such file"),
        ("x" * 100_000, "100000 characters"),
        ("", "unknown preset ''"),
    ],
)
def test_a_bad_flag_value_is_refused_in_one_line(parser, capsys, value, says) -> None:
    with pytest.raises(ArgumentTypeError) as caught:
        preset_or_file(value)
    message = str(caught.value)
    assert says in message and "\n" not in message and len(message) < 600
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args([f"--kv-compress={value}"])
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("text", ["name: [", "just words", "name: x", OWN + "rat: 4"])
def test_a_bad_file_is_refused_in_one_line(tmp_path, text) -> None:
    path = tmp_path / "bad.yml"
    path.write_text(text)
    with pytest.raises(ArgumentTypeError, match=r"bad\.yml is ") as caught:
        preset_or_file(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["rate=4", "[1]", "4", "null", "{", "[" * 100_000, "x" * 100_000])
def test_overrides_must_be_a_json_object(value) -> None:
    with pytest.raises(ArgumentTypeError, match="JSON") as caught:
        json_mapping(value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("flag", "overrides", "says"),
    [
        (None, {"rate": 4}, "add --kv-compress"),
        ({"preset": "snapkv"}, {"preset": "adakv"}, "name it once"),
        ({"preset": "snapkv"}, {"rat": 4}, "unknown key 'rat'"),
        ({"preset": "snapkv"}, {"rate": "4"}, "rate: "),
        ({"preset": "off"}, {"rate": 4}, "would override a preset"),
        ({"preset": "cachegen"}, {"rate": 4}, "would override a preset"),
        ({"preset": "cachegen"}, {"cachegen": 4}, "cachegen: "),
    ],
)
def test_contradictions_are_refused(flag, overrides, says) -> None:
    with pytest.raises(ValueError, match=says):
        merged(flag, overrides)


def test_the_store_is_named_once_and_with_a_preset() -> None:
    with pytest.raises(ValueError, match="add --kv-compress, or `--kv-compress cachegen`"):
        merged(None, None, "redis://one")
    with pytest.raises(ValueError, match="name two stores"):
        merged({"preset": "off"}, {"cachegen": {"store": "redis://two"}}, "redis://one")
    both = merged({"preset": "off"}, {"cachegen": {"levels": [2, 4]}}, "redis://one")
    assert both["cachegen"] == {"levels": [2, 4], "store": "redis://one"}


def test_a_contradiction_ends_the_process_with_one_line(parser, capsys) -> None:
    args = parser.parse_args(["--kv-compress-config", '{"rate": 4}'])
    with pytest.raises(SystemExit) as stopped:
        EngineArgs.from_cli_args(args)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_programs_without_our_flags_pass() -> None:
    register()
    args = Namespace(model=MODEL, additional_config={"other": 1})
    assert EngineArgs.from_cli_args(args).additional_config == {"other": 1}
