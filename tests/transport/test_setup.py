"""A store named in one word becomes vLLM's own configuration, or one line of complaint."""

from pathlib import Path

import pytest
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import EngineArgs

from vllm_kvcompress.config import StartupError
from vllm_kvcompress.plugin import register
from vllm_kvcompress.transport.settings import default_store

MODEL = "vllm_kvcompress/demo_model"


def configured(kv_compress=None, **more):
    register()
    additional = {} if kv_compress is None else {"kv_compress": kv_compress}
    args = EngineArgs(
        model=MODEL, max_model_len=512, enforce_eager=True, additional_config=additional, **more
    )
    args.create_engine_config()
    return args.create_engine_config()  # vLLM may ask twice


def by_hand(store, **settings) -> KVTransferConfig:
    return KVTransferConfig(
        kv_connector="CacheGenConnector",
        kv_connector_module_path="vllm_kvcompress.transport.connector",
        kv_role="kv_both",
        kv_connector_extra_config={"store": str(store), **settings},
    )


def test_a_preset_with_a_store_is_a_connector_that_recomputes_what_fails(tmp_path) -> None:
    asked = {"preset": "snapkv", "cachegen": {"store": f"{tmp_path}/kv", "levels": [1, 4]}}
    config = configured(asked)
    transfer = config.kv_transfer_config
    assert transfer.kv_connector == "CacheGenConnector" and transfer.kv_role == "kv_both"
    assert transfer.kv_load_failure_policy == "recompute"
    assert transfer.kv_connector_extra_config == asked["cachegen"]
    assert (tmp_path / "kv").is_dir()
    assert config.additional_config["kv_compress"]["preset"] == "snapkv"


def test_without_a_name_the_store_is_the_environments_or_a_capped_folder(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = f"file://{tmp_path}/vllm-kvcompress?max_gb=20"
    config = configured("cachegen")
    assert config.kv_transfer_config.kv_connector_extra_config == {"store": folder}
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert default_store() == f"file://{Path.home()}/.cache/vllm-kvcompress?max_gb=20"
    monkeypatch.setenv("KV_COMPRESS_STORE", "redis://host/3")
    config = configured("cachegen")
    assert config.kv_transfer_config.kv_connector_extra_config == {"store": "redis://host/3"}


def test_a_preset_without_a_store_has_no_connector() -> None:
    assert configured("snapkv").kv_transfer_config is None


def test_ones_own_connector_configuration_stays_and_lends_its_store(tmp_path) -> None:
    config = configured("cachegen", kv_transfer_config=by_hand(tmp_path))
    assert config.kv_transfer_config.kv_load_failure_policy == "fail"
    assert config.additional_config["kv_compress"]["cachegen"] == {"store": str(tmp_path)}
    assert configured(kv_transfer_config=by_hand(tmp_path)).additional_config == {}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"store": "ftp://x"}, "unknown kind; known are file:///folder, redis://"),
        ({"store": "redis://me:secret@host"}, "REDIS_PASSWORD"),
        ({"store": "/proc/nowhere"}, "nowhere"),
        ({"colour": 1}, "colour: .*known: store, levels"),
        ({"levels": [5]}, "levels"),
        ({"chunk_tokens": 100}, "not a multiple of the block size 32"),
        ({"profile": "/nowhere"}, "nowhere"),
    ],
)
def test_a_bad_setting_is_one_line_before_anything_starts(tmp_path, settings, says) -> None:
    settings = {"store": str(tmp_path), **settings}
    ways = (
        {"kv_compress": {"preset": "cachegen", "cachegen": settings}},
        {"kv_transfer_config": by_hand(**settings), "block_size": 32},
    )
    for way in ways:
        with pytest.raises(StartupError, match=says) as caught:
            configured(**way)
        assert "\n" not in str(caught.value) and "secret" not in str(caught.value)


def test_two_stores_are_one_too_many(tmp_path) -> None:
    asked = {"cachegen": {"store": "redis://host"}}
    with pytest.raises(StartupError, match="two stores: give one"):
        configured(asked, kv_transfer_config=by_hand(tmp_path))
