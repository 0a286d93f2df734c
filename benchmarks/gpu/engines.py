"""vLLM with and without compression on a GPU: the same words at rate 1."""

from pathlib import Path
from typing import Any

import vllm_kvcompress
from vllm_kvcompress.bench.gpu.skipped import need_gpu
from vllm_kvcompress.bench.gpu.where import REHEARSAL

DEMO = Path(vllm_kvcompress.__file__).parent / "demo_model"
GRAPHS = {
    "mode": 0,
    "cudagraph_mode": "FULL_DECODE_ONLY",
    "cudagraph_capture_sizes": [1, 2] if REHEARSAL else [1, 2, 4, 8],
}
LENGTHS, SAID, DTYPES = (
    ((5, 70), 4, [("bfloat16", "auto")])
    if REHEARSAL
    else ((5, 40, 200, 777, 1500), 32, [("float32", "triton"), ("bfloat16", "auto")])
)
FORCED = {"rate": 1, "test_force_arena": True}
LEAD = 0.05  # in bf16 a word may differ where the best two are closer than this


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


def identity() -> dict[str, Any]:
    """The demo model through an arena that drops nothing, eager and in graphs."""
    need_gpu()
    import gc
    import random

    import torch

    draw = random.Random(0)
    prompts = [[draw.randrange(16, 600) for _ in range(n)] for n in LENGTHS]
    rows, failed = [], []
    for dtype, engine in DTYPES:
        said: dict[str, list[Any]] = {}
        for name, settings, eager in (
            ("plain", None, True),
            ("eager", FORCED | {"attention_engine": engine}, True),
            ("graphs", FORCED | {"attention_engine": engine}, False),
        ):
            how = {"enforce_eager": True} if eager else {"compilation_config": GRAPHS}
            backend = {"attention_backend": "TRITON_ATTN"} if dtype == "float32" else {}
            llm = open_engine(
                str(DEMO),
                settings,
                dtype=dtype,
                max_model_len=2048,
                gpu_memory_utilization=0.2,
                num_gpu_blocks_override=2000,
                max_num_seqs=16,
                **how,
                **backend,
            )
            said[name] = ask(llm, prompts, SAID)
            del llm
            gc.collect()
            torch.cuda.empty_cache()
        for name in ("eager", "graphs"):
            lead = 1e-4 if dtype == "float32" else LEAD
            agree = same_words(said[name], said["plain"], lead)
            what = f"{dtype}, {engine}, {name}: answers as plain vLLM's"
            found, met = f"{agree}/{len(prompts)}", agree == len(prompts)
            rows.append({"what": what, "found": found, "bound": f"{len(prompts)}", "met": met})
            failed += [what] if agree < len(prompts) else []
    return {"rows": rows} | ({"state": "failed", "why": "; ".join(failed)} if failed else {})
