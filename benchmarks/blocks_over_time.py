"""Blocks held while the same requests are answered: compressed, continually, and not.

python benchmarks/blocks_over_time.py --plot docs/img/blocks_over_time.png
"""

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from vllm_kvcompress.bench.child import Child
from vllm_kvcompress.bench.engine import BLOCK_TOKENS, MODEL, EngineSpec, Round, Workload
from vllm_kvcompress.bench.harness import write_report
from vllm_kvcompress.bench.options import BenchCommand, Model, Threads

LINES = {
    "plain vLLM": (None, "#8a8f98"),
    "kv-compress, 8x": ({"rate": 8}, "#2f6fb3"),
    "continual, 8x": ({"preset": "kv-compress-continual"}, "#d2691e"),
}


def measure(work: Workload, model: str, threads: int) -> dict[str, Round]:
    """One round of each engine, in a cache that holds everything uncompressed."""
    per_request = -(-(work.prompt_tokens + work.output_tokens) // BLOCK_TOKENS)
    rounds = {}
    for name, (setting, _) in tqdm(LINES.items(), unit="engine"):
        spec = EngineSpec(
            model=model,
            cache_blocks=(work.prompts + 1) * per_request,
            kv_compress=setting,
            max_model_len=work.prompt_tokens + work.output_tokens,
        )
        with Child(name, spec, threads, plugin=setting is not None) as child:
            rounds[name] = child.run(work, trace=True)
    return rounds


def plot(rounds: Mapping[str, Round], work: Workload, path: Path) -> None:
    """Blocks held after each engine step, a line per engine."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 3.8))
    steps = max(len(done.blocks) for done in rounds.values())
    for name, done in rounds.items():
        colour = LINES[name][1]
        axes.fill_between(range(len(done.blocks)), done.blocks, color=colour, alpha=0.12)
        axes.plot(done.blocks, color=colour, linewidth=2)
        axes.annotate(
            f"{name}\nat most {max(done.blocks)}",
            (steps * 1.02, done.blocks[-work.prompts - 1]),
            va="center",
            color=colour,
            fontsize=10.5,
            annotation_clip=False,
        )
    axes.set_xlim(0, steps * 1.01)
    axes.set_ylim(0, max(max(done.blocks) for done in rounds.values()) * 1.08)
    axes.set_xlabel("engine step", fontsize=11)
    axes.set_ylabel("cache blocks held", fontsize=11)
    axes.set_title(
        f"{work.prompts} requests of {work.prompt_tokens:,} prompt and {work.output_tokens} "
        f"output tokens, {BLOCK_TOKENS} tokens a block",
        fontsize=11,
        loc="left",
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=10)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


app = typer.Typer(add_completion=False)


@app.command(cls=BenchCommand)
def main(
    prompts: Annotated[int, typer.Option(help="Requests, submitted at once.")] = 16,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens per prompt.")] = 2048,
    output_tokens: Annotated[int, typer.Option(help="Tokens generated per request.")] = 512,
    threads: Threads = 0,
    model: Model = str(MODEL),
    json: Annotated[Path | None, typer.Option(help="Write the lines there.")] = None,
    plot_file: Annotated[Path, typer.Option("--plot", help="Write the figure there.")] = Path(
        "docs/img/blocks_over_time.png"
    ),
) -> None:
    """Draw how many cache blocks are held, step by step, while the same requests are answered.

    The cache is large enough for all of them uncompressed, so nothing has to wait. A block is
    counted from its allocation to its release by the scheduler. The numbers depend on lengths
    and settings only, not on the machine or on what the prompts say.
    """
    threads = threads or len(os.sched_getaffinity(0))
    work = Workload(prompts, prompt_tokens, output_tokens)
    rounds = measure(work, model, threads)
    for name, done in rounds.items():
        mean = sum(done.blocks) / len(done.blocks)
        print(f"{name:28} at most {max(done.blocks):5}, mean {mean:7.1f}, {done.steps} steps")
    plot(rounds, work, plot_file)
    if json:
        lines = {name: done.blocks for name, done in rounds.items()}
        write_report(json, threads, asdict(work), blocks_held=lines)


if __name__ == "__main__":
    app()
