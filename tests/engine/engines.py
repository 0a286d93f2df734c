"""Engines in this process, each started once, and what a test wants to see of their insides."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from tokenizers import Tokenizer
from vllm import LLM, SamplingParams

import vllm_kvcompress
from vllm_kvcompress.bench.demo_model.language import many_facts_task
from vllm_kvcompress.engine.compressor import Compressor
from vllm_kvcompress.engine.propagation import Propagation
from vllm_kvcompress.engine.scheduler import KVCompressScheduler

DEMO_MODEL = str(Path(vllm_kvcompress.__file__).parent / "demo_model")
BLOCK = 32
_started: dict[Any, LLM] = {}


def engine(
    kv_compress: dict | None = None,
    *,
    blocks: int = 1500,
    step_tokens: int = 1024,
    max_requests: int = 64,
    model: str = DEMO_MODEL,
    eager: bool = True,
    **options: Any,
) -> LLM:
    """The engine with these settings; the same one for the same settings."""
    sizes = blocks, step_tokens, max_requests
    key = repr((model, eager, kv_compress, *sizes, sorted(options.items())))
    if key not in _started:
        _started[key] = LLM(
            model=model,
            dtype="float32",
            enforce_eager=eager,
            block_size=BLOCK,
            max_model_len=min(4096, (blocks - 1) * BLOCK),
            max_num_batched_tokens=step_tokens,
            max_num_seqs=min(max_requests, step_tokens),
            num_gpu_blocks_override=blocks,
            additional_config={"kv_compress": kv_compress} if kv_compress else {},
            **options,
        )
    return _started[key]


def scheduler_of(llm: LLM) -> KVCompressScheduler:
    return llm.llm_engine.engine_core.engine_core.scheduler


def compressor_of(llm: LLM) -> Compressor:
    return worker_of(llm).compressor


def propagation_of(llm: LLM) -> Propagation:
    return worker_of(llm).propagation


def runner_of(llm: LLM) -> Any:
    return worker_of(llm).model_runner


def worker_of(llm: LLM) -> Any:
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker


def free_blocks(llm: LLM) -> int:
    return scheduler_of(llm).kv_cache_manager.block_pool.get_num_free_blocks()


@contextmanager
def counted(owner: Any, method: str) -> Iterator[list[Any]]:
    """The arguments of every call of one object's method inside the block."""
    calls, original = [], getattr(owner, method)
    setattr(owner, method, lambda *a, **k: (calls.append(a), original(*a, **k))[1])
    try:
        yield calls
    finally:
        delattr(owner, method)


def greedy(tokens: int, knobs: dict | None = None, **more: Any) -> SamplingParams:
    more.setdefault("ignore_eos", True)
    return SamplingParams(
        temperature=0, max_tokens=tokens, logprobs=2, extra_args=knobs or None, **more
    )


@cache
def _tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(Path(DEMO_MODEL) / "tokenizer.json"))


def prompt(rng: Random, tokens: int) -> list[int]:
    """A stretch of the demo model's own language: on other text it magnifies rounding errors."""
    text = many_facts_task(rng, tokens + 128, 4).prompt
    ids = _tokenizer().encode(text, add_special_tokens=False).ids
    start = rng.randrange(len(ids) - tokens)
    return ids[start : start + tokens]


@dataclass
class Answer:
    """What one request said, token by token."""

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[dict[int, float]] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    cached_tokens: int | None = None


def answers(outputs: list[Any]) -> list[Answer]:
    """vLLM's outputs, one answer per sequence."""
    return [
        Answer(
            list(output.prompt_token_ids),
            list(said.token_ids),
            [{t: p.logprob for t, p in step.items()} for step in said.logprobs or ()],
            said.text,
            said.finish_reason,
            output.num_cached_tokens,
        )
        for output in outputs
        for said in output.outputs
    ]


def ask(llm: LLM, prompts: list[list[int]], params: Any) -> list[Answer]:
    """Put all prompts at once and wait."""
    wrapped = [{"prompt_token_ids": ids} for ids in prompts]
    return answers(llm.generate(wrapped, params, use_tqdm=False))


def steps(
    llm: LLM, after_step: Callable[[], None] | None = None, most: int = 20_000
) -> Iterator[list[Any]]:
    """Step until all is done, yielding what each step finished."""
    for _ in range(most):
        if not llm.llm_engine.has_unfinished_requests():
            return
        outputs = llm.llm_engine.step()
        if after_step is not None:
            after_step()
        yield [output for output in outputs if output.finished]
    raise AssertionError(f"not done after {most} steps")


def assert_same_words(got: list[Answer], want: list[Answer], tie: float = 1e-5) -> int:
    """Token identity, except after a tie of the two best within `tie`; returns the ties met."""
    assert len(got) == len(want)
    ties = 0
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.prompt == b.prompt, f"answer {i} belongs to another prompt"
        if a.tokens == b.tokens:
            continue
        at = next(
            (k for k, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=False)) if x != y),
            min(len(a.tokens), len(b.tokens)),
        )
        assert at < min(len(a.tokens), len(b.tokens)), (
            f"prompt {i} ({len(a.prompt)} tokens): {len(a.tokens)} tokens, not {len(b.tokens)}"
        )
        best = sorted(b.logprobs[at].values(), reverse=True)
        gap = best[0] - best[1]
        assert gap <= tie, (
            f"prompt {i} ({len(a.prompt)} tokens) differs at token {at}: {a.tokens[at]} instead of "
            f"{b.tokens[at]}, whose lead was {gap:.2e}"
        )
        ties += 1
    return ties


def assert_all_free(llm: LLM, initial: int) -> None:
    """Nothing leaked; a last empty step tells the worker which requests have ended."""
    if hasattr(scheduler_of(llm), "check_integrity"):
        scheduler_of(llm).check_integrity()
        compressor_of(llm).check_integrity()
    assert free_blocks(llm) == initial, f"{initial} blocks were free, now {free_blocks(llm)}"
