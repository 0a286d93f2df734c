"""How much sooner the first token comes with token-selective propagation, beside what FLOPs say.

python benchmarks/tsp.py --prompt-tokens 1024 4096 8192
"""

import json as jsonlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_kvcompress.accounting import tsp_selected_tokens
from vllm_kvcompress.bench.charts import COLOURS, panels, save
from vllm_kvcompress.bench.crossover import Point
from vllm_kvcompress.bench.engine import BLOCK_TOKENS, MODEL, EngineSpec, Workload
from vllm_kvcompress.bench.harness import Summary, Verdict, cpu_model, paired_ratio, write_report
from vllm_kvcompress.bench.options import ListCommand
from vllm_kvcompress.bench.table import Table
from vllm_kvcompress.bench.throughput import Grid, measure
from vllm_kvcompress.bench.variants import PLAIN, STOCK, Engine, Variant
from vllm_kvcompress.presets import shipped_presets

COLUMNS = ("prompt tokens", "row", "first token ms", "x plain", "FLOPs say", "of that")
OF_PREDICTED = 0.95
FLAT = 0.95
COMPUTE_BOUND_TOKENS = 4096  # verdicts from here on


@dataclass(frozen=True)
class Shape:
    """A Llama without weights: large enough to be bound by computing, small enough for a CPU."""

    layers: int = 8
    hidden: int = 768
    intermediate: int = 2048
    heads: int = 12
    kv_heads: int = 4
    head_size: int = 64
    vocabulary: int = 9728  # of the demo model, whose tokenizer it borrows

    def prefill_flops(self, n: int, selected: int | None = None, last_full: int = 0) -> int:
        """Multiply-adds, counted twice, of a prompt of n tokens up to its first token.

        Projections, MLP, causal attention, and the head for one token. With `selected`, the
        layers above `last_full` see so many tokens.
        """
        counts = [n if selected is None or l <= last_full else selected for l in range(self.layers)]
        queries = self.heads * self.head_size
        per_token = self.hidden * (2 * queries + 2 * self.kv_heads * self.head_size)
        per_token += 3 * self.hidden * self.intermediate
        layers = sum(2 * per_token * c + 4 * queries * c * (c + 1) // 2 for c in counts)
        return layers + 2 * self.hidden * self.vocabulary

    @contextmanager
    def folder(self, longest: int) -> Iterator[str]:
        """A model folder for `--load-format dummy`."""
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_size,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": longest,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
        }
        with tempfile.TemporaryDirectory() as path:
            for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
                shutil.copy(MODEL / name, path)
            (Path(path) / "config.json").write_text(jsonlib.dumps(config))
            yield path


def rows_of(tsp_rates: Sequence[float], rates: Sequence[float]) -> list[Variant]:
    """Plain vLLM, TSP alone at each `tsp_rate`, and `fastkv` at each compression rate."""
    rows = [STOCK]
    for share in tsp_rates:
        engine = Engine(f"tsp {share:g}", {"preset": "tsp", "tsp_rate": share})
        rows.append(Variant(engine.name, "nothing evicted", engine, {}, "tsp", 1))
    engine = Engine("fastkv", {"preset": "fastkv"})
    for rate in rates:
        asks = {"kv_compress_rate": rate}
        rows.append(Variant(f"fastkv {rate:g}", "and evicted", engine, asks, "fastkv", rate))
    return rows


def predicted(shape: Shape, row: Variant, n: int) -> float:
    """Plain vLLM's FLOPs over the row's."""
    preset = shipped_presets()[str(row.preset)]
    own = dict(row.engine.kv_compress or {})
    settings = preset.settings(tsp_rate=own.get("tsp_rate", preset.tsp_rate))
    selected = tsp_selected_tokens(n, BLOCK_TOKENS, settings)
    last_full = preset.last_full_layer(shape.layers)
    return shape.prefill_flops(n) / shape.prefill_flops(n, selected, last_full)


def faster(grid: Grid, point: Point, name: str, than: str = PLAIN) -> Summary:
    samples = grid.samples[point]
    return paired_ratio([r.wall_s for r in samples[than]], [r.wall_s for r in samples[name]])


def table(shape: Shape, rows: Sequence[Variant], grid: Grid, rounds: int) -> Table:
    lines = []
    for point, samples in grid.samples.items():
        for row in rows:
            times = Summary.of(1e3 * r.wall_s for r in samples[row.name]).text(0)
            cells = [f"{point.prompt_tokens:,}", row.name, times]
            if row.name == PLAIN:
                lines.append([*cells, "1", "1", "-"])
                continue
            ratio, says = faster(grid, point, row.name), predicted(shape, row, point.prompt_tokens)
            lines.append([*cells, ratio.text(2), f"{says:.2f}", f"{ratio.median / says:.1%}"])
    note = f"Medians and ranges of {rounds} rounds, one prompt at a time, eager, random weights."
    return Table("Time to the first token with selected tokens only", COLUMNS, lines, note)


def verdicts(shape: Shape, rows: Sequence[Variant], grid: Grid) -> list[Verdict]:
    """From `COMPUTE_BOUND_TOKENS` on: what FLOPs say, and flat in the cache budget."""
    found = []
    for point in grid.samples:
        if point.prompt_tokens < COMPUTE_BOUND_TOKENS:
            continue
        evicting = [row.name for row in rows if row.preset == "fastkv"]
        for row in rows[1:]:
            says = predicted(shape, row, point.prompt_tokens)
            what = f"first token, {row.name}, {point.prompt_tokens:,} tokens"
            measured = faster(grid, point, row.name)
            found.append(Verdict(what, measured, round(OF_PREDICTED * says, 3)))
        for name in evicting[1:]:
            what = f"{name} as soon as {evicting[0]}, {point.prompt_tokens:,} tokens"
            found.append(Verdict(what, faster(grid, point, name, evicting[0]), FLAT))
    return found


def plot(shape: Shape, rows: Sequence[Variant], grid: Grid, path: Path, caption: str) -> None:
    """Speed-up over plain vLLM against the prompt's length, measured and predicted."""
    figure, (axis,) = panels(1)
    lengths = [point.prompt_tokens for point in grid.samples]
    for row, colour in zip(rows[1:], COLOURS, strict=False):
        sums = [faster(grid, point, row.name) for point in grid.samples]
        axis.plot(lengths, [s.median for s in sums], "o-", color=colour, label=row.name, ms=4)
        axis.fill_between(
            lengths, [s.low for s in sums], [s.high for s in sums], color=colour, alpha=0.15, lw=0
        )
        says = [predicted(shape, row, n) for n in lengths]
        axis.plot(lengths, says, ":", color=colour)
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axis.set_xlabel("prompt tokens")
    axis.set_ylabel("x plain vLLM; dotted: FLOPs")
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False)
    save(figure, path, caption)


app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command(cls=ListCommand)
def main(
    prompt_tokens: Annotated[
        list[int] | None,
        typer.Option(help="Tokens per prompt, a list (default 1024 2048 4096).", min=1),
    ] = None,
    tsp_rates: Annotated[
        list[float] | None, typer.Option(help="Shares that go on (default 0.2).")
    ] = None,
    rates: Annotated[
        list[float] | None, typer.Option(help="Compression rates of fastkv (default 10 5).")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Measured prompts of every row.", min=1)] = 5,
    threads: Annotated[int, typer.Option(help="OpenMP threads; 0 for all cores.", min=0)] = 0,
    layers: Annotated[int, typer.Option(help="Layers of the model.", min=2)] = 8,
    hidden: Annotated[int, typer.Option(help="Its hidden size, a multiple of 64.", min=64)] = 768,
    batched_tokens: Annotated[
        int, typer.Option(help="Token budget of a step: longer prompts go in chunks.", min=32)
    ] = 2048,
    json: Annotated[Path, typer.Option(help="The report; the plot goes beside it.")] = Path(
        "results/tsp.json"
    ),
) -> None:
    """How much sooner the first token comes when deep layers see selected tokens only.

    A Llama of random weights, large enough to be bound by computing; every row is an engine of
    its own, eager, and they take turns with the same prompts.

    * **x plain**: plain vLLM's time over the row's, round by round.
    * **FLOPs say**: plain vLLM's floating-point operations over the row's: projections, MLP,
      causal attention, the head. Bookkeeping, selection and eviction are not in it.

    Exit code 1 where, from 4,096 tokens on, less than 95 % of that is reached, or the budget of
    the cache changes the time.
    """
    threads = threads or len(os.sched_getaffinity(0))
    lengths = sorted(set(prompt_tokens or [1024, 2048, 4096]))
    heads = hidden // 64
    kv_heads = next(k for k in (4, 3, 2, 1) if heads % k == 0)
    inner = hidden * 8 // 3 // 64 * 64
    shape = Shape(layers, hidden, inner, heads, kv_heads)
    rows = rows_of(tsp_rates or [0.2], rates or [10, 5])
    with shape.folder(lengths[-1] + 64) as model:
        spec = EngineSpec(
            model=model,
            cache_blocks=3 * -(-(lengths[-1] + 1) // BLOCK_TOKENS),
            max_model_len=lengths[-1] + 1,
            batched_tokens=batched_tokens,
            max_seqs=min(16, batched_tokens),
            load_format="dummy",
        )
        points = [Point(1, length) for length in lengths]
        grid = measure(rows, points, spec, Workload(0, 0, 1), rounds, threads)
    if grid.refused:
        raise typer.BadParameter("; ".join(f"{k}: {v}" for k, v in grid.refused.items()))
    shown, judged = table(shape, rows, grid, rounds), verdicts(shape, rows, grid)
    console = Console()
    console.print(shown.rich())
    for verdict in judged:
        console.print(verdict.text(), highlight=False)
    picture = json.with_suffix(".png")
    caption = (
        f"{layers} layers of width {hidden}, {threads} thread(s) of {cpu_model()}; median and "
        f"range of {rounds} rounds"
    )
    plot(shape, rows, grid, picture, caption)
    write_report(
        json,
        threads,
        {**asdict(spec), **asdict(shape), "rounds": rounds},
        bench="tsp",
        title="Token-selective propagation and the first token",
        tables=[shown],
        plots=[picture],
        verdicts=judged,
        points=[
            {
                "prompt_tokens": point.prompt_tokens,
                "first_token_s": {name: [r.wall_s for r in rs] for name, rs in samples.items()},
                "predicted": {
                    row.name: predicted(shape, row, point.prompt_tokens) for row in rows[1:]
                },
            }
            for point, samples in grid.samples.items()
        ],
    )
    console.print(f"written: {json}, {picture}", highlight=False)
    if not all(verdict.met for verdict in judged):
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
