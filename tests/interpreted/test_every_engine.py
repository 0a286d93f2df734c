"""Each attention engine inside the real vLLM says what the `cpu` engine says.

Selection of tokens, compression, questions after both, decode, and a prompt loaded from CacheGen's
store. vLLM's own attention, for all that is not compressed, is computed in torch.
"""

from importlib.util import find_spec
from random import Random

import pytest
from engine.engines import ask, compressor_of, counted, engine, greedy, prompt, propagation_of
from interpreted import stand_ins
from vllm import envs
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.distributed.kv_transfer.kv_transfer_state import ensure_kv_transfer_shutdown
from vllm.v1.attention.backends import triton_attn
from vllm.v1.attention.ops import triton_unified_attention

from vllm_kvcompress.engine.attention import load
from vllm_kvcompress.engine.attention.xformers import XFormersEngine

NAMES = "flash_attn", "flashinfer", "xqa", "xformers"
SAID, CHUNK = 3, 32
QUESTION = {"kv_compress_question": 5}
KNOBS = (QUESTION, QUESTION | {"kv_compress": "tsp"}, QUESTION | {"kv_compress": "fastkv"}, {})
LENGTHS = 70, 75, 70, 7


def started(attention_engine: str, **settings):
    settings |= {"attention_engine": attention_engine, "rate": 4, "window_tokens": 8}
    return engine(settings, blocks=60, step_tokens=40, max_requests=4)


def prompts(seed: str) -> list[list[int]]:
    rng = Random(seed)
    return [prompt(rng, n) for n in LENGTHS]


def said(llm, seed: str) -> list[list[int]]:
    with (
        counted(compressor_of(llm), "_compress") as compressions,
        counted(compressor_of(llm), "_hold") as held,
        counted(propagation_of(llm), "_go_on") as selections,
    ):
        answers = ask(llm, prompts(seed), [greedy(SAID, knobs) for knobs in KNOBS])
    assert (len(compressions), len(held), len(selections)) == (2, 1, 2)
    compressor_of(llm).check_integrity()
    return [answer.tokens for answer in answers]


def unified_attention(*, q, k, v, out, cu_seqlens_q, seqused_k, softmax_scale, block_table, **_):
    """vLLM's, head by head."""
    group = q.shape[1] // k.shape[2]
    for head in range(k.shape[2]):
        of = slice(head * group, (head + 1) * group)
        halves = (half[:, :, head : head + 1] for half in (k, v))
        where = block_table, seqused_k, softmax_scale, cu_seqlens_q
        out[: len(q), of] = stand_ins.attention(q[:, of], *halves, *where).to(out.dtype)


@pytest.fixture(scope="module")
def want():
    """Before an engine with a store is there: vLLM has one per process, for all engines."""
    ensure_kv_transfer_shutdown()
    llm = started("cpu")
    return {name: said(llm, name) for name in NAMES}


@pytest.fixture(scope="module")
def on_device(want, tmp_path_factory):
    """One engine, whose attention engine is exchanged."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
        for module in (triton_attn, triton_unified_attention):
            patch.setattr(module, "unified_attention", unified_attention)
        envs.disable_envs_cache()
        folder = str(tmp_path_factory.mktemp("store"))
        yield started("triton", cachegen={"store": folder, "levels": [4], "chunk_tokens": CHUNK})
        ensure_kv_transfer_shutdown()


def use(llm, attention_engine) -> None:
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    for impl in (layer.impl for layer in layers):
        impl.engine = attention_engine


@pytest.mark.parametrize("name", NAMES)
def test_it_says_what_the_cpu_engine_says(name, want, on_device, monkeypatch):
    if name == "xqa" and find_spec("flashinfer") is None:
        pytest.skip("no flashinfer-python")
    if name == "xformers" and XFormersEngine.obstacle(None, "float16"):
        pytest.skip("no xformers, or its Triton")
    stand_in = {
        "flash_attn": stand_ins.flash_attention,
        "flashinfer": stand_ins.flashinfer,
        "xqa": stand_ins.xqa,
    }
    called = stand_in[name](monkeypatch) if name in stand_in else None
    attends = load("flashinfer" if name == "xqa" else name)()
    use(on_device, attends)
    with counted(attends, "attend") as calls:
        assert said(on_device, name) == want[name]
    assert {call.most_queries for (call,) in calls} == {1, QUESTION["kv_compress_question"]}
    assert called is None or called
    connector = get_kv_transfer_group()
    connector.transfers.flush(30)
    assert on_device.reset_prefix_cache()
    (loaded,) = ask(on_device, prompts(name)[:1], [greedy(SAID, QUESTION)])
    assert loaded.cached_tokens == CHUNK and loaded.tokens == want[name][0]
