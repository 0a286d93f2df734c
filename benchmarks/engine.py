"""A vLLM engine in this process, stepped by hand so that every step can be looked at."""

import hashlib
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import vllm_kvcompress

MODEL = Path(vllm_kvcompress.__file__).parent / "demo_model"
BLOCK_TOKENS = 32
FIRST_WORD = 16  # token ids below are special


@dataclass(frozen=True)
class EngineSpec:
    """An engine as a benchmark wants it.

    kv_compress: this project's settings; None for an engine without.
    kv_cache_dtype: as vLLM's option; `auto` is the model's own.
    """

    model: str
    cache_blocks: int
    kv_compress: Mapping[str, Any] | None = None
    max_model_len: int = 4096
    batched_tokens: int = 2048
    max_seqs: int = 128
    block_tokens: int = BLOCK_TOKENS
    dtype: str = "float32"
    prefix_caching: bool = True
    load_format: str = "auto"
    eager: bool = True
    kv_cache_dtype: str = "auto"


@dataclass(frozen=True)
class Cache:
    """What an engine really allocated: blocks that requests can hold, and what each takes."""

    blocks: int
    block_bytes: int
    element_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.blocks * self.block_bytes


def environment(threads: int, plugin: bool = True) -> dict[str, str]:
    """What must be in the environment before vLLM is imported."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_PLUGINS": "kv_compress" if plugin else "",
    }


def prepare(threads: int) -> None:
    """Set up this process for an engine; call before anything imports torch or vLLM."""
    os.environ.update(environment(threads))


def open_engine(spec: EngineSpec) -> Any:
    """A `vllm.LLM`; its cache has one block more than `cache_blocks`, vLLM's null block."""
    from vllm import LLM

    settings = {"kv_compress": dict(spec.kv_compress)} if spec.kv_compress is not None else {}
    return LLM(
        model=spec.model,
        dtype=spec.dtype,
        load_format=spec.load_format,
        enforce_eager=spec.eager,
        block_size=spec.block_tokens,
        num_gpu_blocks_override=spec.cache_blocks + 1,
        max_model_len=spec.max_model_len,
        max_num_batched_tokens=spec.batched_tokens,
        max_num_seqs=spec.max_seqs,
        enable_prefix_caching=spec.prefix_caching,
        kv_cache_dtype=spec.kv_cache_dtype,
        additional_config=settings,
    )


def cache_of(llm: Any) -> Cache:
    """The cache of an open engine, without vLLM's null block."""
    config = scheduler_of(llm).kv_cache_config
    total_bytes = sum(tensor.size for tensor in config.kv_cache_tensors)
    (group,) = config.kv_cache_groups
    return Cache(
        blocks=config.num_blocks - 1,
        block_bytes=total_bytes // config.num_blocks,
        element_bytes=group.kv_cache_spec.dtype.itemsize,
    )


@dataclass(frozen=True)
class Workload:
    """Prompts of random words, the same for every engine that is given the same seed."""

    prompts: int
    prompt_tokens: int
    output_tokens: int
    seed: int = 0
    extra_args: Mapping[str, Any] | None = None

    def token_ids(self, vocabulary: int) -> list[list[int]]:
        rng = random.Random(str(self.seed))  # an int would lose its sign
        words = range(FIRST_WORD, vocabulary)
        return [rng.choices(words, k=self.prompt_tokens) for _ in range(self.prompts)]


@dataclass
class Round:
    """A workload run to its end. Seconds are wall time unless they say CPU.

    A *decode step* is one that computes no prompt token; `decode_tokens` were generated in them.
    """

    wall_s: float = 0.0
    cpu_s: float = 0.0
    decode_s: float = 0.0
    decode_cpu_s: float = 0.0
    steps: int = 0
    decode_steps: int = 0
    decode_tokens: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0
    peak_running: int = 0
    peak_blocks: int = 0
    digest: str = ""
    blocks: list[int] = field(default_factory=list)  # held after each step, when traced
    running: list[int] = field(default_factory=list)

    @property
    def total_per_s(self) -> float:
        return (self.prompt_tokens + self.output_tokens) / self.wall_s

    @property
    def decode_per_s(self) -> float:
        return self.decode_tokens / self.decode_s if self.decode_s else float("nan")

    @property
    def mean_running(self) -> float:
        return self.decode_tokens / self.decode_steps if self.decode_steps else float("nan")


def run(llm: Any, work: Workload, trace: bool = False) -> Round:
    """Submit all prompts at once and step the engine until every answer is written.

    The prefix cache is emptied first: rounds of one engine may repeat the same prompts.
    """
    from vllm import SamplingParams

    llm.reset_prefix_cache()

    vocabulary = llm.model_config.get_vocab_size()
    prompts = [{"prompt_token_ids": ids} for ids in work.token_ids(vocabulary)]
    params = SamplingParams(
        temperature=0,
        max_tokens=work.output_tokens,
        ignore_eos=True,
        extra_args=dict(work.extra_args) if work.extra_args else None,
    )
    done = Round(prompt_tokens=work.prompts * work.prompt_tokens)
    answers: dict[str, Sequence[int]] = {}
    with watched(llm) as scheduled:
        began, began_cpu = time.perf_counter(), time.process_time()
        llm.enqueue(prompts, params, use_tqdm=False)
        _step_to_end(llm, done, scheduled, answers, trace)
        done.wall_s = time.perf_counter() - began
        done.cpu_s = time.process_time() - began_cpu
    done.output_tokens = sum(map(len, answers.values()))
    in_order = sorted(answers, key=lambda request_id: int(request_id.split("-")[0]))
    tokens = [list(answers[request_id]) for request_id in in_order]
    done.digest = hashlib.sha256(repr(tokens).encode()).hexdigest()[:16]
    return done


def _step_to_end(
    llm: Any, done: Round, scheduled: list[Any], answers: dict[str, Sequence[int]], trace: bool
) -> None:
    engine, scheduler = llm.llm_engine, scheduler_of(llm)
    pool = scheduler.kv_cache_manager.block_pool
    usable = pool.num_gpu_blocks - 1
    while engine.has_unfinished_requests():
        began, began_cpu = time.perf_counter(), time.process_time()
        finished = engine.step()
        seconds, cpu_s = time.perf_counter() - began, time.process_time() - began_cpu
        held = usable - pool.get_num_free_blocks()
        for output in finished:
            answers[output.request_id] = output.outputs[0].token_ids
        done.steps += 1
        done.peak_blocks = max(done.peak_blocks, held)
        if trace:
            done.blocks.append(held)
            done.running.append(len(scheduler.running))
        if not scheduled:
            continue
        step = scheduled[-1]
        sequences = len(step.num_scheduled_tokens)
        done.peak_running = max(done.peak_running, sequences)
        done.preemptions += len(step.preempted_req_ids or ())
        if step.total_num_scheduled_tokens == sequences and not step.scheduled_new_reqs:
            done.decode_steps += 1
            done.decode_tokens += sequences
            done.decode_s += seconds
            done.decode_cpu_s += cpu_s


def scheduler_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


@contextmanager
def watched(llm: Any) -> Iterator[list[Any]]:
    """Collect what the scheduler decides, step by step."""
    scheduler, outputs = scheduler_of(llm), []
    schedule = scheduler.schedule

    def schedule_and_note(*args: Any, **kwargs: Any) -> Any:
        outputs.append(schedule(*args, **kwargs))
        return outputs[-1]

    scheduler.schedule = schedule_and_note
    try:
        yield outputs
    finally:
        del scheduler.schedule
