"""What this project's own work costs: compressing a prompt, and bookkeeping in a decode step.

python benchmarks/overhead.py --json overhead.json
"""

import inspect
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vllm_kvcompress.bench.engine import (
    BLOCK_TOKENS,
    MODEL,
    EngineSpec,
    Workload,
    open_engine,
    prepare,
    scheduler_of,
)
from vllm_kvcompress.bench.harness import Summary, Verdict, write_report
from vllm_kvcompress.bench.options import BenchCommand, Dtype, Model, Threads
from vllm_kvcompress.bench.progress import progress_bar

VLLM, BUILDER, ACCOUNTING = "vLLM", "metadata builder", "accounting"
COMPRESSION, ATTENTION = "compression", "per-head attention"
PROPAGATION = "propagation"  # saliency, selection, stash
OURS = (BUILDER, ACCOUNTING)
WARM_UP = 3
REPORT_WIDTH = 110


@dataclass
class Clock:
    """Exclusive seconds per label: time in a call counts for the innermost labelled one.

    now: what the time is, in seconds.
    """

    now: Callable[[], float] = field(default_factory=lambda: perf_counter)
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    calls: Counter[str] = field(default_factory=Counter)
    _stack: list[str] = field(default_factory=lambda: [VLLM])
    _since: float = field(init=False)

    def __post_init__(self) -> None:
        self._since = self.now()

    def wrap(self, owner: Any, name: str, label: str) -> None:
        """Put a stopwatch around `owner.name`, once."""
        if not hasattr(vars(owner)[name], "timed_as"):
            setattr(owner, name, self.timed(vars(owner)[name], label))

    def wrap_overrides(self, owner: type, label: str, line: type | None = None) -> None:
        """Time the methods of `owner` that override one of a base; what they pass on is vLLM's.

        `line` is the class whose bases count, where `owner` is a mixin.
        """
        order = (line or owner).__mro__
        bases = order[order.index(owner) + 1 :]
        for name, method in list(vars(owner).items()):
            base = next((base for base in bases if name in vars(base)), None)
            if base is None or name.startswith("__") or not inspect.isfunction(method):
                continue
            self.wrap(owner, name, label)
            if inspect.isfunction(vars(base)[name]):
                self.wrap(base, name, VLLM)

    def timed(self, function: Callable[..., Any], label: str) -> Callable[..., Any]:
        stack, calls = self._stack, self.calls

        def stopwatch(*args: Any, **kwargs: Any) -> Any:
            self._charge()
            stack.append(label)
            calls[label] += 1
            try:
                return function(*args, **kwargs)
            finally:
                self._charge()
                stack.pop()

        stopwatch.timed_as = label  # type: ignore[attr-defined]
        return stopwatch

    def lap(self) -> tuple[dict[str, float], Counter[str]]:
        """Seconds and calls per label since the last lap."""
        self._charge()
        lap = dict(self.seconds), self.calls.copy()
        self.seconds.clear()
        self.calls.clear()
        return lap

    def _charge(self) -> None:
        now = self.now()
        self.seconds[self._stack[-1]] += now - self._since
        self._since = now


def stopwatch_cost(calls: int = 100_000) -> tuple[float, float]:
    """Seconds that a stopwatch itself adds per call: to the label it times, to its caller's."""
    clock = Clock()
    empty = clock.timed(lambda: None, ACCOUNTING)
    clock.lap()
    for _ in range(calls):
        empty()
    seconds, _ = clock.lap()
    return seconds[ACCOUNTING] / calls, seconds[VLLM] / calls


def watch_everything(clock: Clock) -> None:
    """Stopwatches on every way from vLLM into this project, and back by `super()`."""
    from vllm_kvcompress.engine import compressor, cpu, propagation, scheduler, worker
    from vllm_kvcompress.paging import manager

    clock.wrap_overrides(manager.PerHeadManager, ACCOUNTING)
    clock.wrap_overrides(scheduler._PerHead, ACCOUNTING)
    clock.wrap_overrides(worker.PerHeadWorker, ACCOUNTING, cpu.KVCompressCPUWorker)
    clock.wrap_overrides(cpu.PerHeadMetadataBuilder, BUILDER)
    clock.wrap(worker.StepView, "lay_out", BUILDER)
    clock.wrap(cpu.PerHeadAttentionImpl, "_attend_per_head", ATTENTION)
    clock.wrap(compressor.Compressor, "finish_step", COMPRESSION)
    clock.wrap(propagation.Propagation, "_leave", PROPAGATION)
    clock.wrap(propagation.Propagation, "_go_on", VLLM)
    clock.wrap(propagation.Propagation, "_rows_of", PROPAGATION)


@dataclass(frozen=True)
class Step:
    """A step's seconds by label, the stopwatches' own cost taken out."""

    prompt_tokens: int
    running: int
    seconds: dict[str, float]

    def share(self, *labels: str) -> float:
        return sum(self.seconds.get(label, 0.0) for label in labels) / sum(self.seconds.values())


def steps(llm: Any, clock: Clock, work: Workload, cost: tuple[float, float]) -> list[Step]:
    """Run a workload step by step."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": i} for i in work.token_ids(llm.model_config.get_vocab_size())]
    params = SamplingParams(
        temperature=0,
        max_tokens=work.output_tokens,
        ignore_eos=True,
        extra_args=dict(work.extra_args) if work.extra_args else None,
    )
    llm.enqueue(prompts, params, use_tqdm=False)
    engine, scheduler = llm.llm_engine, scheduler_of(llm)
    done = []
    while engine.has_unfinished_requests():
        waiting = sum(
            r.num_prompt_tokens - r.num_computed_tokens
            for r in scheduler.requests.values()
            if r.num_computed_tokens < r.num_prompt_tokens
        )
        clock.lap()
        engine.step()
        seconds, calls = clock.lap()
        left = sum(
            r.num_prompt_tokens - r.num_computed_tokens
            for r in scheduler.requests.values()
            if r.num_computed_tokens < r.num_prompt_tokens
        )
        inner, outer = cost
        net = {label: s - calls[label] * inner for label, s in seconds.items()}
        net[VLLM] -= sum(calls.values()) * outer
        done.append(Step(waiting - left, len(scheduler.running), net))
    return done


def prefills(
    llm: Any,
    clock: Clock,
    work: Workload,
    count: int,
    cost: tuple[float, float],
    tell: Callable[[], Any] = lambda: None,
) -> list[Step]:
    """Prompts one at a time, the steps of each added up; three more, before, warm up."""
    done = []
    for seed in range(-WARM_UP, count):
        llm.reset_prefix_cache()
        seen = steps(llm, clock, replace(work, prompts=1, output_tokens=1, seed=seed), cost)
        seconds: Counter[str] = Counter()
        for step in seen:
            seconds.update(step.seconds)
        if seed >= 0:
            done.append(Step(work.prompt_tokens, 0, dict(seconds)))
        tell()
    return done


def compression_over_rest(prefill: Step) -> float:
    """Seconds of selecting and compressing per second of the rest of a prefill."""
    share = prefill.share(COMPRESSION, PROPAGATION)
    return share / (1 - share)


app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command(cls=BenchCommand)
def main(
    running: Annotated[int, typer.Option(help="Compressed requests in a decode step.")] = 64,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens per prompt.")] = 2048,
    decode_steps: Annotated[int, typer.Option(help="Decode steps of each round.")] = 128,
    prompts: Annotated[int, typer.Option(help="Prompts compressed one by one.")] = 40,
    rounds: Annotated[int, typer.Option(help="Rounds of the decode part.", min=1)] = 5,
    rate: Annotated[float, typer.Option(help="Compression rate.")] = 8,
    preset: Annotated[str, typer.Option(help="Compression preset.")] = "kv-compress",
    threads: Threads = 0,
    model: Model = str(MODEL),
    dtype: Dtype = "float32",
    load_format: Annotated[str, typer.Option(help="As vLLM's.")] = "auto",
    json: Annotated[Path | None, typer.Option(help="Write the report there.")] = None,
) -> None:
    """How much of prefill and of a decode step is this project's own work.

    Stopwatches are put around the methods that vLLM calls, and around what these pass on to
    vLLM by `super()`; a label's time is exclusive, and the stopwatches' own cost, measured
    first, is taken out.

    * **compression**: scoring, choosing and copying, per second that the rest of the step takes;
      prompts come one at a time, each in one step.
    * **builder and accounting**: block bookkeeping in the scheduler, following the scheduler's
      news in the worker, and laying out the page tables, as a share of the whole step.
    * **per-head attention** is the model's own work done another way, and counts for neither.
    """
    threads = threads or len(os.sched_getaffinity(0))
    parameters = dict(locals())
    prepare(threads)
    clock = Clock()
    watch_everything(clock)
    cost = stopwatch_cost()
    outputs = running + decode_steps  # the first request decodes while the last one waits
    blocks = -(-(prompt_tokens + outputs) // BLOCK_TOKENS)
    spec = EngineSpec(
        model=model,
        cache_blocks=running * blocks + blocks,
        kv_compress={"preset": preset, "rate": rate},
        max_model_len=prompt_tokens + outputs,
        batched_tokens=max(2048, prompt_tokens),
        max_seqs=running,
        dtype=dtype,
        load_format=load_format,
    )
    llm = open_engine(spec)

    with progress_bar() as progress:
        bar = progress.add_task("prefill", total=WARM_UP + prompts)
        lone = Workload(1, prompt_tokens, 1)
        shares = prefills(llm, clock, lone, prompts, cost, lambda: progress.advance(bar))
    batch = Workload(running, prompt_tokens, outputs)
    decode: list[list[Step]] = []
    for seed in track(range(1000, 1001 + rounds), description="decode"):
        seen = steps(llm, clock, replace(batch, seed=seed), cost)
        decode.append([s for s in seen if s.prompt_tokens == 0 and s.running == running])
    decode = decode[1:]  # the first warms up

    compression = Summary.of(map(compression_over_rest, shares))
    parts = {
        label: Summary.of(_mean([s.share(label) for s in round_]) for round_ in decode)
        for label in (BUILDER, ACCOUNTING, COMPRESSION, ATTENTION, VLLM)
    }
    both = Summary.of(_mean([s.share(*OURS) for s in round_]) for round_ in decode)
    step_s = Summary.of(_mean([sum(s.seconds.values()) for s in round_]) for round_ in decode)
    prefill_s = Summary.of(sum(s.seconds.values()) for s in shares)
    compression_s = Summary.of(s.seconds[COMPRESSION] for s in shares)

    console = Console(width=None if sys.stdout.isatty() else REPORT_WIDTH)
    out = Table(title=f"a decode step of {running} compressed requests: {_ms(step_s)}")
    out.add_column("part")
    out.add_column("us per step", justify="right")
    out.add_column("share (range)", justify="right")
    for label, share in parts.items():
        out.add_row(label, f"{share.median * step_s.median * 1e6:,.0f}", _percent(share))
    console.print(out)
    console.print(
        f"a prompt of {prompt_tokens} tokens: {_ms(prefill_s)}, of it compression "
        f"{_ms(compression_s)}"
    )
    verdicts = [
        Verdict(f"compression over the rest of prefill, {prompt_tokens} tokens", compression,
                0.03, at_most=True),
        Verdict(f"builder and accounting in a step of {running}", both, 0.05, at_most=True),
    ]  # fmt: skip
    for verdict in verdicts:
        console.print(verdict.text(), highlight=False)
    if json:
        write_report(
            json,
            threads,
            parameters,
            prefill_s=asdict(prefill_s),
            compression_s=asdict(compression_s),
            decode_step_s=asdict(step_s),
            decode_shares={label: asdict(share) for label, share in parts.items()},
            bench="overhead",
            title="What compression and its bookkeeping take of a step",
            verdicts=verdicts,
        )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _ms(seconds: Summary) -> str:
    return f"{Summary(*(1e3 * s for s in asdict(seconds).values())).text(2)} ms"


def _percent(share: Summary) -> str:
    return f"{share.median:.1%} ({share.low:.1%}-{share.high:.1%})"


if __name__ == "__main__":
    app()
