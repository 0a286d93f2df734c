"""One prompt's compression, part by part, without an engine.

python benchmarks/compression.py --shapes demo 8b --tokens 2048 8192
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_kvcompress.bench.attention_step import SHAPES, Cache, Point, Shape, load_kernels
from vllm_kvcompress.bench.engine import BLOCK_TOKENS, prepare
from vllm_kvcompress.bench.harness import Summary, write_report
from vllm_kvcompress.bench.options import ListCommand
from vllm_kvcompress.bench.overhead import Clock
from vllm_kvcompress.bench.table import Table
from vllm_kvcompress.presets import shipped_presets

REPORT_WIDTH = 110
REQUEST = "prompt"
SCORING, CHOOSING, COPYING, TABLES, REST = "scoring", "choosing", "copying", "tables", "rest"
PARTS = (SCORING, CHOOSING, COPYING, TABLES, REST)


class Prompt:
    """A prompt of random keys, values and queries in scattered blocks, compressed at will."""

    def __init__(
        self, shape: Shape, tokens: int, preset: str, rate: float, torch_only: bool
    ) -> None:
        import numpy as np
        import torch
        from vllm import SamplingParams
        from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput

        from vllm_kvcompress.config import parse_engine_config
        from vllm_kvcompress.engine.cpu import KVCompressCPUWorker
        from vllm_kvcompress.engine.worker import PerHeadWorker

        cache = Cache(shape, Point(2, tokens), spread=0)  # the second request is the arena
        config = parse_engine_config({"preset": preset, "rate": rate})
        worker = KVCompressCPUWorker.__new__(KVCompressCPUWorker)
        make = PerHeadWorker.make_compressor if torch_only else type(worker).make_compressor
        self.compressor = make(worker, config, cache.pool, shape.head_size**-0.5)
        self._natural, arena = cache.blocks
        kept = -(-int(tokens / rate) // BLOCK_TOKENS)
        self._blocks = (self._natural[: -(-tokens // BLOCK_TOKENS)] + arena[:kept],)
        self._new = NewRequestData(
            REQUEST, [0] * tokens, [], SamplingParams(), None, self._blocks, 0, None
        )
        self._step = replace(
            SchedulerOutput.make_empty(),
            scheduled_new_reqs=[self._new],
            num_scheduled_tokens={REQUEST: tokens},
            finished_req_ids={REQUEST},
        )
        heads = shape.kv_heads * shape.group
        self._queries = torch.randn(shape.layers, tokens, heads, shape.head_size, dtype=cache.dtype)
        self._query_start = np.array([0, tokens])

    def compress(self) -> None:
        """What this project does in the step of its prefill."""
        self._new.block_ids = self._blocks
        self.compressor.begin_step(self._step)
        for capture in self.compressor.captures([REQUEST], self._query_start):
            for layer, queries in enumerate(self._queries):
                capture.take(layer, queries)
        self.compressor.finish_step(lambda _: self._natural)

    def laps(self, repeats: int) -> list[dict[str, float]]:
        """CPU seconds of this thread by part, compression by compression; two more warm up."""
        from vllm_kvcompress.policy.policy import Policy

        clock, compressor = Clock(now=time.thread_time), self.compressor
        for owner, name, label in (
            (compressor, "finish_step", REST),
            (compressor, "_copy", COPYING),
            (compressor.judge, "scores", SCORING),
            (compressor.tables, "enter", TABLES),
        ):
            setattr(owner, name, clock.timed(getattr(owner, name), label))
        keep = Policy.keep
        Policy.keep = clock.timed(keep, CHOOSING)  # type: ignore[method-assign]
        found = []
        try:
            for _ in range(repeats + 2):
                clock.lap()
                self.compress()
                found.append(clock.lap()[0])
        finally:
            Policy.keep = keep  # type: ignore[method-assign]
        return found[2:]


def table(
    shape: Shape, measured: Sequence[tuple[str, Sequence[dict[str, float]]]], repeats: int
) -> Table:
    rows = []
    for name, laps in measured:
        whole = Summary.of(1e3 * sum(lap.get(part, 0.0) for part in PARTS) for lap in laps)
        parts = (Summary.of(1e3 * lap.get(part, 0.0) for lap in laps) for part in PARTS)
        rows.append([name, whole.text(2), *(f"{part.median:.2f}" for part in parts)])
    return Table(
        f"Compressing one prompt at {shape.title}",
        ("prompt", "ms", *PARTS),
        rows,
        f"Milliseconds of CPU time of one thread; medians of {repeats}, the whole with its range.",
    )


app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command(cls=ListCommand)
def main(
    shapes: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(SHAPES)} (default: all).")
    ] = None,
    tokens: Annotated[
        list[int] | None,
        typer.Option(help="Tokens per prompt (default 2048 8192).", min=64, max=1 << 17),
    ] = None,
    preset: Annotated[str, typer.Option(help="Compression preset.")] = "kv-compress",
    rate: Annotated[float, typer.Option(help="Compression rate.", min=1, max=1024)] = 8,
    torch_only: Annotated[
        bool, typer.Option("--torch", help="Beside it: without this project's C++.")
    ] = False,
    repeats: Annotated[int, typer.Option(help="Compressions of each.", min=1)] = 9,
    json: Annotated[Path, typer.Option(help="The report.")] = Path("results/compression.json"),
) -> None:
    """What compressing a prompt costs a CPU, part by part, on one thread.

    No engine: the worker's compressor is shown the step of a prompt of random keys, values and
    queries in scattered blocks. What a prefill costs beside it, `bench prefill` says.
    """
    prepare(1)
    load_kernels()
    for name in shapes or ():
        if name not in SHAPES:
            raise typer.BadParameter(f"{name!r} is no shape; there are {', '.join(SHAPES)}")
    if preset not in shipped_presets():
        raise typer.BadParameter(f"{preset!r} is no preset: `vllm-kvcompress presets` lists them")
    chosen = [SHAPES[name] for name in shapes or SHAPES]
    tables, samples = [], {}
    for shape in chosen:
        measured = []
        for n in sorted(set(tokens or [2048, 8192])):
            for plain in (False, True) if torch_only else (False,):
                laps = Prompt(shape, n, preset, rate, plain).laps(repeats)
                measured.append((f"{n:,} tokens{', torch' if plain else ''}", laps))
        tables.append(table(shape, measured, repeats))
        samples[shape.name] = dict(measured)
    console = Console(width=None if sys.stdout.isatty() else REPORT_WIDTH)
    for one in tables:
        console.print(one.rich())
    write_report(
        json,
        1,
        {"preset": preset, "rate": rate, "repeats": repeats},
        bench="compression",
        title="Compressing a prompt, part by part",
        tables=tables,
        samples=samples,
    )
    console.print(f"written: {json}", highlight=False)


if __name__ == "__main__":
    app()
