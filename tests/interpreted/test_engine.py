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
)
from vllm import envs

from vllm_kvcompress.engine import page_kernels
from vllm_kvcompress.engine.device_compressor import DeviceCompressor
from vllm_kvcompress.kernels.cuda import CudaPages

SAID = 3
MODULES = {"0": "vllm.v1.worker.cpu_model_runner", "1": "vllm.v1.worker.cpu.model_runner"}


def said(attention_engine: str, max_requests: int, **settings):
    """Prompts in chunks, whose questions meet compressed or held pages, beside one that decodes.

    The deep layers see 38 tokens of 70.
    """
    rng = Random(3)
    settings |= {"attention_engine": attention_engine, "rate": 4, "window_tokens": 8}
    llm = engine(settings, blocks=60, step_tokens=40, max_requests=max_requests)
    prompts = [prompt(rng, n) for n in (70, 7, 75, 70)]
    question = {"kv_compress_question": 5}
    params = [
        greedy(SAID, question),
        greedy(SAID + 2),
        greedy(SAID, question | {"kv_compress": "tsp"}),
        greedy(SAID, {"kv_compress": "fastkv"}),
    ]
    compressor = compressor_of(llm)
    with (
        counted(compressor, "_compress") as compressions,
        counted(compressor, "_hold") as held,
        counted(propagation_of(llm), "_go_on") as selections,
    ):
        answers = ask(llm, prompts, params)
    assert (len(compressions), len(held), len(selections)) == (2, 1, 2)
    compressor.check_integrity()
    return llm, [answer.tokens for answer in answers]


def noted(method, called):
    def call(*args, **options):
        called.append(method.__name__)
        return method(*args, **options)

    return call


@pytest.fixture(scope="module")
def want():
    return said("cpu", 4)[1]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("second", ["0", "1"], ids=["first runner", "second runner"])
def test_the_triton_engine_says_what_the_cpu_engine_says(want, second, monkeypatch, request):
    """With Triton's kernels on the first runner, with CUDA's on the second."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", second)
    envs.disable_envs_cache()
    kernels, called = ("triton", "cuda")[int(second)], []
    if kernels == "cuda":
        built = request.getfixturevalue("cuda_on_host")
        monkeypatch.setattr(page_kernels, "cuda_library", lambda: built)
        for name in ("attend_pages", "compact"):
            monkeypatch.setattr(CudaPages, name, noted(getattr(CudaPages, name), called))
    llm, got = said("triton", 4 + int(second), kernels=kernels)  # another number, another engine
    assert got == want
    assert set(called) == ({"attend_pages", "compact"} if kernels == "cuda" else set())
    assert isinstance(compressor_of(llm), DeviceCompressor)
    assert type(runner_of(llm)).__module__ == MODULES[second]
