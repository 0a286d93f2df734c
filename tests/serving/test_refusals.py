"""What compression does not work with is refused at start-up, in one line that says what to do."""

from types import SimpleNamespace as Bag

import pytest
from vllm.config import CompilationMode, KVTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backends import fa_utils

from vllm_kvcompress.config import EngineConfig
from vllm_kvcompress.engine import setup
from vllm_kvcompress.engine.propagation_limits import with_tsp_capacity
from vllm_kvcompress.engine.refusals import (
    AFTER,
    ON_DEVICE,
    StartupError,
    refuse,
    refuse_platform,
    refuse_version,
)
from vllm_kvcompress.engine.setup import with_engine
from vllm_kvcompress.plugin import register

MODEL = "vllm_kvcompress/demo_model"


def engine_args(**changes) -> EngineArgs:
    register()
    plain = {
        "model": MODEL,
        "max_model_len": 4096,
        "enforce_eager": True,
        "additional_config": {"kv_compress": True},
    }
    return EngineArgs(**{**plain, **changes})


def fake_config(text=(), model=(), cache=(), parallel=(), **own) -> Bag:
    """The parts of a `VllmConfig` that the rows look at, of a plain decoder."""
    text_config = Bag(**dict(text))
    plain = {
        "runner_type": "generate",
        "is_encoder_decoder": False,
        "is_attention_free": False,
        "is_hybrid": False,
        "is_diffusion": False,
        "use_mla": False,
        "uses_alibi": False,
        "architectures": ["LlamaForCausalLM"],
        "hf_text_config": text_config,
        "get_sliding_window": lambda: getattr(text_config, "sliding_window", None),
    }
    return Bag(
        model_config=Bag(**{**plain, **dict(model)}),
        cache_config=Bag(
            **{
                "cache_dtype": "auto",
                "kv_sharing_fast_prefill": False,
                "prefix_match_unit": None,
                "block_size": 32,
                **dict(cache),
            }
        ),
        parallel_config=Bag(
            **{
                "decode_context_parallel_size": 1,
                "prefill_context_parallel_size": 1,
                "pipeline_parallel_size": 1,
                **dict(parallel),
            }
        ),
        speculative_config=own.get("speculative_config"),
        kv_transfer_config=own.get("kv_transfer_config"),
    )


REFUSED = {
    "pooling": (dict(model={"runner_type": "pooling"}), "pooling models"),
    "whisper": (dict(model={"is_encoder_decoder": True}), "cross-attention"),
    "mamba": (dict(model={"is_attention_free": True}), "without attention"),
    "jamba": (dict(model={"is_hybrid": True}), "hybrid models"),
    "deepseek": (dict(model={"use_mla": True}), r"\(MLA\)"),
    "bloom": (dict(model={"uses_alibi": True}), "ALiBi"),
    "gpt-oss": (dict(model={"architectures": ["GptOssForCausalLM"]}), "attention sinks"),
    "mimo": (dict(text={"add_swa_attention_sink_bias": True}), "attention sinks"),
    "mistral": (dict(text={"sliding_window": 4096}), "a window of 4096 tokens"),
    "gemma": (
        dict(text={"layer_types": ["full_attention", "sliding_attention"]}),
        r"chunked attention \(sliding_attention\)",
    ),
    "llama4": (dict(text={"attention_chunk_size": 8192}), "chunks of 8192 tokens"),
    "gemma3n": (dict(text={"num_kv_shared_layers": 15}), "share their KV cache"),
    "openelm": (dict(text={"num_key_value_heads": [3, 3, 4]}), "different numbers of KV heads"),
    "nemotron": (dict(text={"block_configs": [{}]}), "different numbers of KV heads"),
    "speculation": (dict(speculative_config=object()), "drop --speculative-config"),
    "fp8": (dict(cache={"cache_dtype": "fp8_e4m3"}), "--kv-cache-dtype fp8_e4m3"),
    "fast prefill": (dict(cache={"kv_sharing_fast_prefill": True}), "kv-sharing-fast-prefill"),
    "hash unit": (dict(cache={"prefix_match_unit": 16}), "every 16 tokens"),
    "connector": (dict(kv_transfer_config=Bag(kv_connector="NixlConnector")), "NixlConnector"),
    "DCP": (dict(parallel={"decode_context_parallel_size": 2}), "decode context .*2 ranks"),
    "PP": (dict(parallel={"pipeline_parallel_size": 2}), "pipeline .*2 ranks"),
    "PCP": (dict(parallel={"prefill_context_parallel_size": 2}), "prefill context .*2 ranks"),
}


@pytest.mark.parametrize(("changes", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_a_combination_is_refused_in_one_line(changes, says) -> None:
    with pytest.raises(StartupError, match=says) as caught:
        refuse(AFTER, fake_config(**changes))
    message = str(caught.value)
    assert message.startswith("kv-compress does not work with ") and " yet: " in message
    assert "\n" not in message and len(message) < 250


def assert_compresses(args: EngineArgs) -> None:
    config = args.create_engine_config()
    assert config.scheduler_config.scheduler_cls.startswith("vllm_kvcompress.engine.scheduler.")
    assert config.parallel_config.worker_cls.startswith("vllm_kvcompress.engine.cpu.")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(hf_overrides={"layer_types": ["full_attention"] * 4, "num_kv_shared_layers": 0}),
        dict(hf_overrides={"num_key_value_heads": 4, "sliding_window": None}),
        dict(dtype="bfloat16", kv_cache_dtype="bfloat16", block_size=32, prefix_match_unit=32),
    ],
)
def test_a_plain_decoder_is_welcome(changes) -> None:
    assert_compresses(engine_args(**changes))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(worker_cls="my.Worker"), r"--worker-cls my\.Worker"),
        (dict(scheduler_cls="my.Scheduler"), r"--scheduler-cls my\.Scheduler"),
        (dict(hf_overrides={"sliding_window": 512}), "a window of 512 tokens"),
        (
            dict(
                kv_transfer_config=KVTransferConfig(
                    kv_connector="ExampleConnector", kv_role="kv_both"
                )
            ),
            "ExampleConnector",
        ),
        (dict(prefix_match_unit=16), "every 16 tokens"),
        (dict(additional_config={"kv_compress": "nope"}), "unknown preset 'nope'"),
        (dict(additional_config={"kv_compress": [1]}), "must be true, a preset"),
        (
            dict(additional_config={"kv_compress": {"scorer": {"name": "mine"}}}),
            "unknown scorer 'mine'",
        ),
    ],
)
def test_a_real_configuration_is_refused(changes, says) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        engine_args(**changes).create_engine_config()
    assert isinstance(caught.value, StartupError) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "says"),
    [("VLLM_USE_V2_MODEL_RUNNER", "V2 model runner"), ("VLLM_USE_RUST_FRONTEND", "Rust")],
)
def test_an_environment_that_contradicts_is_refused(monkeypatch, variable, says) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(StartupError, match=f"{says}.*: .*unset {variable}"):
        engine_args().create_engine_config()


@pytest.mark.parametrize("version", ["0.31.2", "0.33.0", "0.320.0", "1.0", "dev"])
def test_another_vllm_is_refused(version) -> None:
    with pytest.raises(StartupError, match=rf"found {version}: install vllm==0\.32\.\*"):
        refuse_version(version)


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1", "0.32.0+cpu", "0.32.1rc1"])
def test_every_patch_release_is_welcome(version, monkeypatch) -> None:
    monkeypatch.setattr("vllm.__version__", version)
    assert_compresses(engine_args())


def test_another_device_is_refused() -> None:
    with pytest.raises(StartupError, match="ROCM support is not built"):
        refuse_platform(Bag(is_cpu=lambda: False, is_cuda=lambda: False, device_name="rocm"))


GPU = Bag(is_cpu=lambda: False, is_cuda=lambda: True, has_device_capability=lambda version: True)


@pytest.fixture
def flash_attention(monkeypatch) -> list[tuple]:
    """A vLLM with FlashAttention; what is warned of."""
    monkeypatch.setattr(fa_utils, "is_flash_attn_varlen_func_available", lambda: True)
    monkeypatch.setattr(fa_utils, "get_flash_attn_version", lambda **_: 3)
    warnings: list[tuple] = []
    monkeypatch.setattr(setup.logger, "warning", lambda *said: warnings.append(said))
    return warnings


def test_a_gpu_is_let_in_with_a_warning(flash_attention) -> None:
    refuse_platform(GPU)
    args = engine_args()
    config = with_engine(EngineConfig(), args, GPU)
    assert config.attention_engine == "flash_attn" and args.attention_backend.name == "FLASH_ATTN"
    ((said, *_),) = flash_attention
    assert "never run on a GPU" in said
    assert with_engine(EngineConfig(), args, GPU) == config, "a second time"


def test_a_backend_that_the_engine_does_not_work_beside_is_refused(flash_attention) -> None:
    args = engine_args(attention_backend="TRITON_ATTN")
    with pytest.raises(StartupError, match="works beside FLASH_ATTN, not TRITON_ATTN: drop"):
        with_engine(EngineConfig(attention_engine="flash_attn"), args, GPU)


@pytest.mark.parametrize(("engine", "says"), [("triton", "no Triton"), ("flash_attn", "CUDA")])
def test_an_engine_that_is_not_here_is_refused(engine, says) -> None:
    settings = {"kv_compress": {"attention_engine": engine}}
    with pytest.raises(StartupError, match=f"attention_engine={engine} cannot run here: .*{says}"):
        engine_args(additional_config=settings).create_engine_config()


def test_a_choice_of_gpu_kernels_is_refused_on_a_cpu() -> None:
    settings = {"kv_compress": {"kernels": "cuda"}}
    with pytest.raises(StartupError, match=r"kernels=cuda is for GPUs, .*: leave it out"):
        engine_args(additional_config=settings).create_engine_config()


@pytest.mark.parametrize(
    ("found", "says"),
    [("use_ubatching", "microbatches"), ("enable_elastic_ep", "ranks that come and go")],
)
def test_a_gpu_engine_refuses_what_its_tables_cannot_follow(found, says) -> None:
    parallel = {"data_parallel_size": 2, "use_ubatching": False, "enable_elastic_ep": False}
    config = fake_config(parallel=parallel | {found: True})
    with pytest.raises(StartupError, match=says):
        refuse(ON_DEVICE, config)


def test_a_gpu_engine_takes_data_parallel_ranks() -> None:
    parallel = {"data_parallel_size": 2, "use_ubatching": False, "enable_elastic_ep": False}
    refuse(ON_DEVICE, fake_config(parallel=parallel))


@pytest.mark.parametrize("off", [None, False])
def test_off_is_plain_vllm(off) -> None:
    config = engine_args(additional_config={"kv_compress": off}).create_engine_config()
    assert config.scheduler_config.scheduler_cls is None
    assert "kvcompress" not in config.parallel_config.worker_cls


def test_the_same_arguments_can_be_configured_twice() -> None:
    args = engine_args()
    first, second = args.create_engine_config(), args.create_engine_config()
    assert first.compute_hash() == second.compute_hash()
    assert first.cache_config.block_size == 32


def test_group_layers_that_do_not_divide_the_model_are_refused() -> None:
    args = engine_args(additional_config={"kv_compress": {"preset": "windowkv", "group_layers": 3}})
    with pytest.raises(StartupError, match="group_layers=3 does not divide the model's 4 layers"):
        args.create_engine_config()


def tsp_args(**settings) -> EngineArgs:
    return engine_args(additional_config={"kv_compress": settings})


def test_room_for_hidden_states_is_the_context_length_unless_said() -> None:
    for given, expected in ({}, 4096), ({"tsp_max_inflight_tokens": 9000}, 9000):
        made = tsp_args(preset="fastkv", **given).create_engine_config()
        assert made.additional_config["kv_compress"]["tsp_max_inflight_tokens"] == expected
    made = tsp_args(tsp_max_inflight_tokens=0).create_engine_config()
    assert made.additional_config["kv_compress"]["tsp_max_inflight_tokens"] == 0


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"preset": "fastkv", "tsp_layer": 3}, "tsp_layer=3 leaves no layer above it"),
        ({"preset": "fastkv", "tsp_rate": 0.0}, "tsp_rate: .*greater than 0"),
        (
            {"preset": "windowkv", "task_classifier": "vllm_kvcompress/demo_model"},
            "task_classifier='.*' cannot be used: it has the labels",
        ),
        ({"preset": "fastkv", "tsp_max_inflight_tokens": 100}, "give at least 4096"),
        ({"preset": "fastkv", "tsp_max_inflight_tokens": 0}, "needs room for hidden states"),
    ],
)
def test_bad_settings_of_propagation_and_tasks_are_one_line(settings, says) -> None:
    with pytest.raises(StartupError, match=says) as caught:
        tsp_args(**settings).create_engine_config()
    assert "\n" not in str(caught.value)


def test_models_whose_layers_are_not_known_are_refused_by_name() -> None:
    def of(architecture: str, lora=None, mode=CompilationMode.VLLM_COMPILE) -> Bag:
        model = {
            "architectures": [architecture],
            "max_model_len": 512,
            "get_total_num_hidden_layers": lambda: 8,
        }
        compilation = Bag(mode=mode)
        return Bag(model_config=Bag(**model), lora_config=lora, compilation_config=compilation)

    plain, fastkv = EngineConfig(), EngineConfig(preset="fastkv")
    for known in ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        assert with_tsp_capacity(fastkv, of(known)).tsp_max_inflight_tokens == 512
    for unknown, lora in (("GPT2LMHeadModel", None), ("LlamaForCausalLM", object())):
        assert with_tsp_capacity(plain, of(unknown, lora)).tsp_max_inflight_tokens == 0
        name = "LoRA" if lora else unknown
        with pytest.raises(StartupError, match=f"'fastkv'.* does not work with {name}"):
            with_tsp_capacity(fastkv, of(unknown, lora))
    with pytest.raises(StartupError, match="does not work with compilation mode STOCK"):
        with_tsp_capacity(fastkv, of(known, mode=CompilationMode.STOCK_TORCH_COMPILE))
    without = with_tsp_capacity(plain, of("GPT2LMHeadModel"))
    assert set(plain.asked_presets()) == {"kv-compress"}, "others must not keep it from starting"
    with pytest.raises(ValueError, match="'tsp' propagates selected tokens, which this server"):
        without.request_settings({"kv_compress": "tsp"}, 512)
    assert without.settings_or_off({"kv_compress": "tsp"}) is None
