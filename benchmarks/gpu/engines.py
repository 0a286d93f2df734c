"""vLLM with and without compression on a GPU: the same words at rate 1, and tokens per second."""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import vllm_kvcompress
from vllm_kvcompress.bench.gpu.skipped import need_gpu

DEMO = Path(vllm_kvcompress.__file__).parent / "demo_model"
# The shape of an 8B model; its weights are random and never saved.
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 32768,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PROMPTS, PROMPT_TOKENS, SAID = 24, 6144, 128
CACHE_TOKENS = 5 * (PROMPT_TOKENS + SAID)  # full with five requests, as on a smaller card
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
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
    prompts = [[draw.randrange(16, 600) for _ in range(n)] for n in (5, 40, 200, 777, 1500)]
    rows, failed = [], []
    for dtype, engine in (("float32", "triton"), ("bfloat16", "auto")):
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
            said[name] = ask(llm, prompts, 32)
            del llm
            gc.collect()
            torch.cuda.empty_cache()
        for name in ("eager", "graphs"):
            lead = 1e-4 if dtype == "float32" else LEAD
            agree = same_words(said[name], said["plain"], lead)
            what = f"{dtype}, {engine}, {name}: answers as plain vLLM's"
            rows.append({"what": what, "found": f"{agree}/{len(prompts)}", "bound": len(prompts)})
            failed += [what] if agree < len(prompts) else []
    return {"rows": rows} | ({"state": "failed", "why": "; ".join(failed)} if failed else {})


def throughput(rate: int | str) -> dict[str, Any]:
    """Tokens per second of the 8B shape with a cache of five prompts; `rate` "plain" is stock."""
    need_gpu()
    import torch

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPE))
        llm = open_engine(
            folder,
            None if rate == "plain" else {"rate": rate},
            dtype="bfloat16",
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=8192,
            max_num_batched_tokens=8192,
            max_num_seqs=64,
            num_gpu_blocks_override=CACHE_TOKENS // 16,
            enable_prefix_caching=False,
            compilation_config=GRAPHS,
            attention_backend="FLASH_ATTN",
        )
        draw = torch.Generator().manual_seed(0)
        shape = (PROMPTS, PROMPT_TOKENS)
        prompts = torch.randint(16, SHAPE["vocab_size"], shape, generator=draw).tolist()
        ask(llm, [prompts[0][:512]], 8)
        began = time.perf_counter()
        ask(llm, prompts, SAID)
        seconds = time.perf_counter() - began
    name = "plain vLLM" if rate == "plain" else f"rate {rate}"
    found = f"{PROMPTS * SAID / seconds:.0f} output tokens/s, {seconds:.1f} s"
    what = f"{name}, {PROMPTS} prompts of {PROMPT_TOKENS}, cache of {CACHE_TOKENS} tokens"
    return {"rows": [{"what": what, "found": found}], "output_tokens_s": PROMPTS * SAID / seconds}
