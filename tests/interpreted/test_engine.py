"""The GPU's backend, builder, compressor and kernels inside the real engine, on both runners."""

from random import Random

import pytest
from engine.engines import (
    ask,
    compressor_of,
    counted,
    engine,
    greedy,
    prompt,
    propagation_of,
    runner_of,
    scheduler_of,
)
from vllm import envs
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.distributed.kv_transfer.kv_transfer_state import ensure_kv_transfer_shutdown

from vllm_kvcompress.engine import page_kernels
from vllm_kvcompress.engine.device_compressor import DeviceCompressor
from vllm_kvcompress.engine.stats import WorkerStats
from vllm_kvcompress.kernels.cuda import CudaPages

SAID, CHUNK = 3, 32
QUESTION = {"kv_compress_question": 5}
MODULES = {"0": "vllm.v1.worker.cpu_model_runner", "1": "vllm.v1.worker.cpu.model_runner"}


def started(attention_engine: str, max_requests: int, **settings):
    settings |= {"attention_engine": attention_engine, "rate": 4, "window_tokens": 8}
    return engine(settings, blocks=60, step_tokens=40, max_requests=max_requests)


def said(llm, attention, compaction):
    """Prompts in chunks, whose questions meet compressed or held pages, beside one that decodes.

    The deep layers see 38 tokens of 70.
    """
    rng = Random(3)
    prompts = [prompt(rng, n) for n in (70, 7, 75, 70)]
    params = [
        greedy(SAID, QUESTION),
        greedy(SAID + 2),
        greedy(SAID, QUESTION | {"kv_compress": "tsp"}),
        greedy(SAID, {"kv_compress": "fastkv"}),
    ]
    compressor = compressor_of(llm)
    with (
        counted(compressor, "_compress") as compressions,
        counted(compressor, "_hold") as held,
        counted(propagation_of(llm), "_go_on") as selections,
        counted(scheduler_of(llm), "make_stats") as stats,
    ):
        answers = ask(llm, prompts, params)
    assert (len(compressions), len(held), len(selections)) == (2, 1, 2)
    sent = [stat.data for args in stats for stat in args if isinstance(stat, WorkerStats)]
    seconds = [took for data in sent for took in data["seconds"]]
    assert len(seconds) == 3 and min(seconds) > 0
    told = [data["kernels"] for data in sent if data["kernels"]]
    assert told == [{"attention": (attention,), "compaction": (compaction,)}]
    compressor.check_integrity()
    return [answer.tokens for answer in answers]


def said_again(llm):
    """The first of these prompts."""
    with counted(compressor_of(llm), "_compress") as compressions:
        (answer,) = ask(llm, [prompt(Random(3), 70)], [greedy(SAID, QUESTION)])
    assert len(compressions) == 1
    return answer


def noted(method, called):
    def call(*args, **options):
        called.append(method.__name__)
        return method(*args, **options)

    return call


@pytest.fixture(scope="module")
def want():
    return said(started("cpu", 4), "cpu", "cpu")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("second", ["0", "1"], ids=["first runner", "second runner"])
def test_the_triton_engine_says_what_the_cpu_engine_says(
    want, second, monkeypatch, request, tmp_path
):
    """With Triton's kernels on the first runner, with CUDA's on the second.

    First it computes, and stores what it may; then it loads that, and says the same again.
    """
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", second)
    envs.disable_envs_cache()
    ensure_kv_transfer_shutdown()
    kernels, called = ("triton", "cuda")[int(second)], []
    if kernels == "cuda":
        built = request.getfixturevalue("cuda_on_host")
        monkeypatch.setattr(page_kernels, "cuda_library", lambda: built)
        for name in ("attend_pages", "compact"):
            monkeypatch.setattr(CudaPages, name, noted(getattr(CudaPages, name), called))
    store = {"store": str(tmp_path), "levels": [4], "chunk_tokens": CHUNK}
    llm = started("triton", 4 + int(second), cachegen=store, kernels=kernels)
    assert said(llm, kernels, kernels) == want
    assert set(called) == ({"attend_pages", "compact"} if kernels == "cuda" else set())
    assert isinstance(compressor_of(llm), DeviceCompressor)
    assert type(runner_of(llm)).__module__ == MODULES[second]
    connector = get_kv_transfer_group()
    connector.transfers.flush(30)
    assert llm.reset_prefix_cache()
    again = said_again(llm)
    assert again.tokens == want[0] and again.cached_tokens == CHUNK
    totals = connector.tally.totals
    assert totals["stored_chunks:4"] == 2 and totals["loaded_chunks:4"] == 1
    ensure_kv_transfer_shutdown()
