"""What compressing takes beside the cache is bounded, and kept from the cache."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from engine.engines import DEMO_MODEL
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins
from vllm.v1.core.kv_cache_utils import get_kv_cache_configs
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_kvcompress.bench.compression_memory import (
    DEVICE,
    LLAMA_8B,
    LOWEST_RATE,
    LiveBytes,
    peaks,
    register_device,
    without_contents,
)
from vllm_kvcompress.config import StartupError
from vllm_kvcompress.engine import worker
from vllm_kvcompress.engine.device_batch import Scratch
from vllm_kvcompress.engine.device_worker import DeviceWorker

PROFILED = 2 << 30
LONG = 1 << 17
KINDS = ["kv-compress-continual", "keydiff", "windowkv", "fastkv", "adakv", "snapkv"]
LAYERS, HEADS, QUERY_HEADS, SIZE, HIDDEN = 4, 4, 8, 32, 128  # of the demo model


@pytest.fixture(scope="module", autouse=True)
def gpu():
    register_device()
    load_general_plugins()


def test_live_bytes_are_those_of_the_devices_tensors_and_inside_its_operators():
    with without_contents(1), LiveBytes() as live:
        first = torch.zeros(1000, 5000, device=DEVICE)  # 20 MB
        second = first[:500] + 1  # 10 MB
        del first
        second.mul_(2)
        assert live.peak == 30e6
        torch.zeros(1000, 5000)
        assert live.peak == 30e6
        second.view(-1, 5000)[:100].sort()  # values, indices, ten times the values inside
        assert live.peak == 10e6 + 100 * 5000 * (4 + 8) + 100 * 5000 * (16 + 4 + 12) > 30e6


@pytest.mark.parametrize("preset", KINDS)
def test_compressing_takes_five_times_the_scores_at_most(preset):
    scores = 4 * LLAMA_8B.layers * LLAMA_8B.heads * LONG
    assert max(peaks(preset, LONG, LLAMA_8B)) <= 5 * scores


@pytest.mark.parametrize("tokens", [3000, 1 << 16])
@pytest.mark.parametrize("preset", KINDS)
def test_compressing_stays_within_what_is_kept_for_it_even_if_nearly_all_is_kept(preset, tokens):
    few_layers = replace(LLAMA_8B, layers=4, heads=2, query_heads=16)
    most = few_layers.compression_bytes(tokens)
    assert 0 < max(peaks(preset, tokens, few_layers, rate=LOWEST_RATE)) <= most


class Profile:
    """vLLM's worker, and what it says."""

    def determine_available_memory(self):
        return PROFILED


class Worker(DeviceWorker, Profile):
    def __init__(self, vllm_config):
        self.vllm_config, self._engine = vllm_config, SimpleNamespace(workspace_bytes=12345)


def configured(**kv_compress):
    settings = {"kv_compress": {"preset": "snapkv", "tsp_max_inflight_tokens": 0, **kv_compress}}
    return EngineArgs(
        model=DEMO_MODEL,
        dtype="bfloat16",
        block_size=16,
        max_model_len=4096,
        max_num_seqs=10,
        max_num_batched_tokens=100_000,
        enforce_eager=True,
        additional_config=settings,
    ).create_engine_config()


def cache_blocks(vllm_config, available):
    """As vLLM counts them."""
    spec = FullAttentionSpec(
        block_size=16, num_kv_heads=HEADS, head_size=SIZE, dtype=torch.bfloat16
    )
    specs = {f"layer{i}": spec for i in range(LAYERS)}
    vllm_config.cache_config.kv_cache_layout = "BLHNC"
    (config,) = get_kv_cache_configs(vllm_config, [specs], [available])
    return config.num_blocks


def kept(**kv_compress):
    return PROFILED - Worker(configured(**kv_compress)).determine_available_memory()


def test_the_cache_is_smaller_by_what_compressing_takes(monkeypatch):
    said = []
    monkeypatch.setattr(worker.logger, "info", lambda *line: said.append(line[0] % line[1:]))
    windows = 10 * 64 * LAYERS * QUERY_HEADS * SIZE * 2  # the longest of a preset, for everyone
    compression = 18 * LAYERS * HEADS * 4096 * 4  # six times the scores, and as they are sorted
    tables = 4 * 10 * (256 + LAYERS * HEADS + 3)
    all_kept = kept()
    assert said == [f"kv-compress keeps {all_kept >> 20} MiB for compressing"]
    own = tables + Scratch.bytes_of(10, HEADS, 256) + 12345
    positions = all_kept - windows - compression - own
    assert positions / (PROFILED - all_kept) == pytest.approx(4 / (2 * SIZE * 2), rel=1e-3)
    plain = configured()
    block_bytes = 16 * LAYERS * HEADS * 2 * SIZE * 2
    assert cache_blocks(plain, PROFILED) == PROFILED // block_bytes
    assert cache_blocks(plain, PROFILED - all_kept) == (PROFILED - all_kept) // block_bytes


def test_each_bound_is_kept_from_the_cache():
    share = 1 - 4 / (4 + 2 * SIZE * 2)
    more = kept(window_max_inflight_tokens=2000) - kept(window_max_inflight_tokens=1000)
    assert more == pytest.approx(share * 1000 * LAYERS * QUERY_HEADS * SIZE * 2, abs=2)
    stash = 4096 * HIDDEN * 2
    step = 6 * 100_000 * HIDDEN * 2 - 18 * LAYERS * HEADS * 4096 * 4
    with_tsp = kept(tsp_max_inflight_tokens=4096) - kept()
    assert with_tsp == pytest.approx(share * (stash + step), abs=2)


def test_with_the_flag_off_nothing_is_kept():
    plain = EngineArgs(model=DEMO_MODEL, dtype="bfloat16").create_engine_config()
    assert plain.parallel_config.worker_cls == "vllm.v1.worker.gpu_worker.Worker"


def test_too_little_memory_and_too_few_windows_are_one_line(monkeypatch):
    with pytest.raises(StartupError, match="less than one window may have: give at least 64"):
        configured(window_max_inflight_tokens=63)
    monkeypatch.setattr(Profile, "determine_available_memory", lambda self: 1 << 20)
    with pytest.raises(ValueError, match=r"give a smaller --max-model-len, .* 0 for no TSP"):
        kept()
