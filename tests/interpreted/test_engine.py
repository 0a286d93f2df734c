"""The GPU's backend, builder, compressor and kernels inside the real engine, on both runners."""

from random import Random

import pytest
from engine.engines import ask, compressor_of, counted, engine, greedy, prompt, runner_of
from vllm import envs
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.distributed.kv_transfer.kv_transfer_state import ensure_kv_transfer_shutdown

from vllm_kvcompress.engine.device_compressor import DeviceCompressor

SAID, CHUNK = 3, 32
MODULES = {"0": "vllm.v1.worker.cpu_model_runner", "1": "vllm.v1.worker.cpu.model_runner"}


def started(attention_engine: str, max_requests: int, **settings):
    settings |= {"attention_engine": attention_engine, "rate": 4, "window_tokens": 8}
    return engine(settings, blocks=60, step_tokens=40, max_requests=max_requests)


def said(llm, requests: int = 2):
    """A prompt in chunks, whose question meets compressed pages, beside one that only decodes."""
    rng = Random(3)
    prompts = [prompt(rng, 70), prompt(rng, 7)]
    params = [greedy(SAID, {"kv_compress_question": 5}), greedy(SAID + 2)]
    with counted(compressor_of(llm), "_compress") as compressions:
        answers = ask(llm, prompts[:requests], params[:requests])
    assert len(compressions) == 1
    compressor_of(llm).check_integrity()
    return answers


@pytest.fixture(scope="module")
def want():
    return [answer.tokens for answer in said(started("cpu", 4))]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("second", ["0", "1"], ids=["first runner", "second runner"])
def test_the_triton_engine_says_what_the_cpu_engine_says(want, second, monkeypatch, tmp_path):
    """First it computes, and stores what it may; then it loads that, and says the same again."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", second)
    envs.disable_envs_cache()
    ensure_kv_transfer_shutdown()
    store = {"store": str(tmp_path), "levels": [4], "chunk_tokens": CHUNK}
    llm = started("triton", 4 + int(second), cachegen=store)
    assert [answer.tokens for answer in said(llm)] == want
    assert isinstance(compressor_of(llm), DeviceCompressor)
    assert type(runner_of(llm)).__module__ == MODULES[second]
    connector = get_kv_transfer_group()
    connector.transfers.flush(30)
    assert llm.reset_prefix_cache()
    (again,) = said(llm, requests=1)
    assert again.tokens == want[0] and again.cached_tokens == CHUNK
    totals = connector.tally.totals
    assert totals["stored_chunks:4"] == 2 and totals["loaded_chunks:4"] == 1
    ensure_kv_transfer_shutdown()
