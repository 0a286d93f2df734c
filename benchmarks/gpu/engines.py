"""vLLM with and without compression on a GPU: the same words at rate 1."""

import gc
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import vllm_kvcompress
from vllm_kvcompress.bench.gpu.row import Row
from vllm_kvcompress.bench.gpu.skipped import need_gpu
from vllm_kvcompress.bench.gpu.where import REHEARSAL

DEMO = Path(vllm_kvcompress.__file__).parent / "demo_model"
LENGTHS, SAID = ((5, 40), 3) if REHEARSAL else ((5, 40, 200, 777, 1500), 32)
LONGEST, BLOCKS, MOST_REQUESTS = (128, 20, 2) if REHEARSAL else (2048, 2000, 16)
GRAPHS = {
    "mode": 0,
    "cudagraph_mode": "FULL_DECODE_ONLY",
    "cudagraph_capture_sizes": [1] if REHEARSAL else [1, 2, 4],
}
NO_AUTOTUNING = {"enable_flashinfer_autotune": False}  # a dense bf16 model has nothing to tune
ONE_BY_ONE, AT_ONCE = "one by one", "at once"
# In each dtype a word may differ where the best two are closer than the last number.
DTYPES = (("bfloat16", "auto", 0.05), ("float32", "triton", 1e-4))
FORCED = {"rate": 1, "test_force_arena": True}


def open_engine(model: str, kv_compress: dict[str, Any] | None, **options: Any) -> Any:
    """An engine in this process, or its error."""
    from vllm import LLM

    additional = {"kv_compress": kv_compress} if kv_compress else {}
    return LLM(model=model, block_size=16, additional_config=additional, **options)


def ask(llm: Any, prompts: list[list[int]], tokens: int) -> list[Any]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=2)
    wrapped = [{"prompt_token_ids": ids} for ids in prompts]
    return [out.outputs[0] for out in llm.generate(wrapped, params, use_tqdm=False)]


def same_words(ours: list[Any], plain: list[Any], lead: float) -> int:
    """How many answers agree, up to a word whose lead was smaller than `lead`."""
    agree = 0
    for a, b in zip(ours, plain, strict=True):
        pairs = zip(a.token_ids, b.token_ids, strict=True)
        at = next((i for i, (x, y) in enumerate(pairs) if x != y), None)
        if at is None:
            agree += 1
            continue
        best = sorted((one.logprob for one in b.logprobs[at].values()), reverse=True)
        agree += best[0] - best[1] < lead
    return agree


def identity(_: Mapping[str, float]) -> Iterator[Row]:
    """The demo model through an arena that drops nothing, in steps with and without a graph."""
    need_gpu()
    draw = random.Random(0)
    prompts = [[draw.randrange(16, 600) for _ in range(n)] for n in LENGTHS]
    for dtype, engine, lead in DTYPES:
        plain = answers(dtype, None, prompts)
        ours = answers(dtype, FORCED | {"attention_engine": engine}, prompts)
        for how, said in ours.items():
            agree = same_words(said.answers, plain[how].answers, lead)
            in_graphs = how == ONE_BY_ONE
            yield Row(
                f"{dtype}, {engine}, {how}: answers that are plain vLLM's",
                f"{agree} of {len(prompts)}, {said.replays} graphs replayed",
                f"all, {'some' if in_graphs else 'none'} replayed",
                agree == len(prompts) and (said.replays > 0) == in_graphs,
            )


@dataclass(frozen=True)
class Said:
    """replays: graphs that were replayed for these answers."""

    answers: list[Any]
    replays: int


def answers(
    dtype: str, kv_compress: dict[str, Any] | None, prompts: list[list[int]]
) -> dict[str, Said]:
    """An engine's words, one prompt at a time in graphs, and all at once, more than graphs take."""
    backend = {"attention_backend": "TRITON_ATTN"} if dtype == "float32" else {}
    llm = open_engine(
        str(DEMO),
        kv_compress,
        dtype=dtype,
        max_model_len=LONGEST,
        max_num_batched_tokens=max(LONGEST, sum(LENGTHS)),
        gpu_memory_utilization=0.2,
        num_gpu_blocks_override=BLOCKS,
        max_num_seqs=MOST_REQUESTS,
        enable_prefix_caching=False,
        compilation_config=GRAPHS,
        kernel_config=NO_AUTOTUNING,
        **backend,
    )
    with counted_replays() as replays:
        alone = [answer for ids in prompts for answer in ask(llm, [ids], SAID)]
        in_graphs = len(replays)
        together = ask(llm, prompts, SAID)
    found = {
        ONE_BY_ONE: Said(alone, in_graphs),
        AT_ONCE: Said(together, len(replays) - in_graphs),
    }
    del llm
    gc.collect()
    torch.cuda.empty_cache()
    return found


@contextmanager
def counted_replays() -> Iterator[list[None]]:
    """Grows by one whenever a CUDA graph is replayed."""
    replay, replays = torch.cuda.CUDAGraph.replay, []

    def counted(graph: Any) -> None:
        replays.append(None)
        replay(graph)

    with patch.object(torch.cuda.CUDAGraph, "replay", counted):
        yield replays
