"""What the plugin makes of an engine's settings where vLLM sees a CUDA GPU."""

from types import SimpleNamespace

import pytest
from engine.engines import DEMO_MODEL
from vllm.config import AttentionConfig, CUDAGraphMode, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms.interface import DeviceCapability
from vllm.plugins import load_general_plugins
from vllm.v1.attention.backends import fa_utils
from vllm.v1.kv_cache_interface import KVCacheLayout
from vllm.vllm_flash_attn import flash_attn_interface

from vllm_kvcompress.config import StartupError
from vllm_kvcompress.engine.attention.flash_attn import FlashAttentionEngine
from vllm_kvcompress.engine.device_worker import KVCompressDeviceWorker


@pytest.fixture(scope="module", autouse=True)
def plugin():
    load_general_plugins()


def configured(kv_compress=None, **options):
    settings = {"kv_compress": {"rate": 4} | (kv_compress or {})}
    options = {"dtype": "bfloat16"} | options
    return EngineArgs(
        model=DEMO_MODEL, additional_config=settings, **options
    ).create_engine_config()


@pytest.mark.parametrize("runner", ["0", "1"])
@pytest.mark.parametrize(
    ("asked", "dtype", "backend", "engine"),
    [
        (None, "bfloat16", "FLASH_ATTN", "flash_attn"),
        ("FLASH_ATTN", "float16", "FLASH_ATTN", "flash_attn"),
        ("TRITON_ATTN", "bfloat16", "TRITON_ATTN", "triton"),
        (None, "float32", "TRITON_ATTN", "triton"),
    ],
)
def test_auto_finds_an_engine_beside_the_backend_asked_for(
    asked, dtype, backend, engine, runner, monkeypatch
):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)
    config = configured(attention_backend=asked, dtype=dtype)
    assert config.attention_config.backend.name == backend
    assert config.additional_config["kv_compress"]["attention_engine"] == engine
    assert config.parallel_config.worker_cls.endswith(".KVCompressDeviceWorker")
    assert config.scheduler_config.async_scheduling
    assert config.scheduler_config.scheduler_cls.endswith(".KVCompressAsyncScheduler")
    assert config.cache_config.block_size == 16
    assert config.compilation_config.cudagraph_num_of_warmups >= 1


def test_graphs_and_layout_are_what_the_backends_take():
    worker = object.__new__(KVCompressDeviceWorker)
    for backend in ("FLASH_ATTN", "TRITON_ATTN"):
        worker.vllm_config = configured(attention_backend=backend)
        ours = worker.backend
        assert ours.get_name() == backend
        assert ours.supported_kv_cache_layouts() == (KVCacheLayout.BLHNC,)
        support = ours.get_builder_cls().get_cudagraph_support(worker.vllm_config, None)
        assert support.name == "UNIFORM_SINGLE_TOKEN_DECODE"
        mode = worker.vllm_config.compilation_config.cudagraph_mode
        assert mode == CUDAGraphMode.FULL_AND_PIECEWISE


@pytest.mark.parametrize("backend", ["FLASH_ATTN", "TRITON_ATTN"])
@pytest.mark.parametrize("window", [None, 64])
def test_a_layer_with_a_window_is_refused_when_it_meets_the_pool(backend, window):
    worker = object.__new__(KVCompressDeviceWorker)
    worker.vllm_config = configured(attention_backend=backend)
    with set_current_vllm_config(worker.vllm_config):
        impl = worker.backend.get_impl_cls()(4, 64, 0.125, 2, None, window, "auto")
    if window is None:
        impl.bind("the pool", 3)
        assert (impl.pool, impl.pool_layer) == ("the pool", 3)
    else:
        with pytest.raises(ValueError, match=r"layer 3 yet: .* sliding window"):
            impl.bind("the pool", 3)


@pytest.mark.parametrize("parallel", ["tensor_parallel_size", "data_parallel_size"])
def test_two_ranks_are_configured_as_one(parallel):
    config = configured(**{parallel: 2}, distributed_executor_backend="mp")
    assert config.parallel_config.worker_cls.endswith(".KVCompressDeviceWorker")


@pytest.mark.parametrize(
    ("capability", "built", "asked", "head_size", "version"),
    [
        ((8, 0), {2}, None, 128, 2),
        ((9, 0), {2, 3, 4}, None, 128, 3),
        ((9, 0), {2, 3, 4}, 2, 128, 2),
        ((9, 0), {2, 3, 4}, 4, 128, None),
        ((9, 0), {2, 3, 4}, None, 512, None),
        ((10, 0), {2, 4}, None, 128, None),
        ((10, 0), {2, 4}, 3, 128, None),
        ((10, 0), {2, 4}, None, 256, 2),
        ((10, 0), {2, 4}, 2, 128, 2),
    ],
)
def test_compressed_requests_get_vllms_own_version_of_flash_attention_or_none(
    capability, built, asked, head_size, version, monkeypatch
):
    monkeypatch.setattr(
        fa_utils.current_platform, "get_device_capability", lambda: DeviceCapability(*capability)
    )
    monkeypatch.setattr(flash_attn_interface, "is_fa_version_supported", built.__contains__)
    config = SimpleNamespace(
        attention_config=AttentionConfig(flash_attn_version=asked),
        model_config=SimpleNamespace(get_head_size=lambda: head_size, is_diffusion=False),
    )
    with set_current_vllm_config(config):
        if version is None:
            with pytest.raises(ValueError, match="calls FlashAttention 2 and 3"):
                FlashAttentionEngine()
        else:
            assert FlashAttentionEngine()._version == version


@pytest.mark.parametrize(
    ("kv_compress", "options", "says"),
    [
        ({"attention_engine": "flash_attn"}, {"attention_backend": "TRITON_ATTN"}, "works beside"),
        ({"attention_engine": "flash_attn"}, {"dtype": "float32"}, "float16 and bfloat16 only"),
        (
            {"attention_engine": "flash_attn"},  # built for 3 alone
            {"attention_config": {"flash_attn_version": 2}},
            "neither FlashAttention 2 nor 3",
        ),
        ({"attention_engine": "cpu"}, {}, "CPU build"),
        ({}, {"attention_backend": "FLEX_ATTENTION"}, "does not work beside FLEX_ATTENTION"),
        ({}, {"ubatch_size": 2, "all2all_backend": "deepep_low_latency"}, "microbatches"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(kv_compress, options, says):
    with pytest.raises(StartupError, match=says) as refusal:
        configured(kv_compress, **options)
    assert "\n" not in str(refusal.value)
