"""`vllm-kvcompress tune ...`: find the settings that depend on the model."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from vllm_kvcompress.bench.engine import BLOCK_TOKENS, MODEL
from vllm_kvcompress.bench.errors import BenchError
from vllm_kvcompress.bench.harness import cpu_model, write_report
from vllm_kvcompress.bench.options import ListCommand, Model, ModelsDtype, Threads
from vllm_kvcompress.bench.tune.asked import Asked
from vllm_kvcompress.presets import Preset

if TYPE_CHECKING:  # torch is imported once it is needed
    from vllm_kvcompress.bench.tune.show import Tried
    from vllm_kvcompress.bench.tune.sweeps import Sweep

NONE_GOOD = 1

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Find the settings that depend on the model, with needles in haystacks.",
)

Tasks = Annotated[
    list[str] | None,
    typer.Option(
        help="Tasks of `bench quality`. Default: needle for the demo model, in its own language; "
        "else niah-number, a number painted on a door, at five depths of an essay."
    ),
]
Length = Annotated[int, typer.Option(min=64, help="Prompt tokens.")]
N = Annotated[int, typer.Option(min=1, help="Prompts of each task; of niah's, at each depth.")]
Seed = Annotated[int, typer.Option(help="Of the prompts.")]
Block = Annotated[int, typer.Option(min=1, help="Tokens of a block.")]
Report = Annotated[Path, typer.Option(help="The report; plot and answers beside it.")]
Fresh = Annotated[bool, typer.Option(help="Drop the answers of an earlier run.")]


@app.command("tsp-layer", cls=ListCommand)
def tsp_layer(
    model: Model = str(MODEL),
    preset: Annotated[str, typer.Option(help="One that propagates, or its file.")] = "fastkv",
    layers: Annotated[
        list[int] | None, typer.Option(help="Layers to try. Default: all, or twelve of many.")
    ] = None,
    tasks: Tasks = None,
    length: Length = 1024,
    n: N = 100,
    seed: Seed = 0,
    block_tokens: Block = BLOCK_TOKENS,
    dtype: ModelsDtype = "",
    threads: Threads = 0,
    json: Report = Path("results/tune-tsp-layer.json"),
    fresh: Fresh = False,
) -> None:
    """Which layer may choose the tokens that the layers above it get to see (`fastkv`, `tsp`).

    Too low, and its attention does not know yet what is asked for; too high, and little is saved.

    * **layers x tokens computed**: roughly the share of the prefill's work that is left.
    * **overlap**: of what the layers above would choose themselves, how much it chooses. Soon
      known, and a hint only: a needle is a small part of it.
    * **score**: the preset with that layer in the running engine; **better / worse than full**
      counts the answers that it alone, or the full cache alone, gets right.

    Advised is the lowest layer with 98 % of the full cache's score. Exit code 1: there is none;
    2: it could not be measured. Interrupted, the same command goes on where it stopped.

    Example: `vllm-kvcompress tune tsp-layer --model MODEL --length 4096 --n 20`
    """

    def sweep(preset: Preset, depth: int) -> "Sweep":
        from vllm_kvcompress.bench.tune.sweeps import TspLayerSweep

        return TspLayerSweep(preset, depth, block_tokens, length, layers or ())

    asked = Asked(model, preset, tasks or [], length, n, seed, block_tokens, dtype, threads)
    _tune(asked, sweep, json, fresh)


@app.command("group-layers", cls=ListCommand)
def group_layers(
    model: Model = str(MODEL),
    preset: Annotated[str, typer.Option(help="One that shares, or its file.")] = "windowkv",
    tasks: Tasks = None,
    length: Length = 1024,
    n: N = 100,
    seed: Seed = 0,
    block_tokens: Block = BLOCK_TOKENS,
    dtype: ModelsDtype = "",
    threads: Threads = 0,
    json: Report = Path("results/tune-group-layers.json"),
    fresh: Fresh = False,
) -> None:
    """How many layers may share one choice of tokens, and which of them chooses (`windowkv`).

    Rows are sizes of groups, led by their first layer (as published) or by their last.

    * **layers scored**: of all; larger groups save more.
    * **overlap**: of what the other layers would choose themselves, how much their leader chooses.
    * **score**: the preset with that setting in the running engine; **better / worse than full**
      counts the answers that it alone, or the full cache alone, gets right.

    Advised are the largest groups with 98 % of the full cache's score. Exit code 1: there are
    none; 2: it could not be measured. Interrupted, the same command goes on where it stopped.

    Example: `vllm-kvcompress tune group-layers --model MODEL --length 4096 --n 20`
    """

    def sweep(preset: Preset, depth: int) -> "Sweep":
        from vllm_kvcompress.bench.tune.sweeps import GroupLayersSweep

        return GroupLayersSweep(preset, depth, block_tokens)

    asked = Asked(model, preset, tasks or [], length, n, seed, block_tokens, dtype, threads)
    _tune(asked, sweep, json, fresh)


def _tune(asked: Asked, make: "Callable[[Preset, int], Sweep]", json: Path, fresh: bool) -> None:
    from vllm_kvcompress.bench.tune import show
    from vllm_kvcompress.bench.tune.measure import Cases, layers_of, read_overlaps, try_all

    console = Console()
    try:
        sweep = make(asked.preset, layers_of(asked.model))
        cases = Cases(asked)
        agree = read_overlaps(asked, sweep, cases)
        found = try_all(asked, sweep, cases, agree, json.with_suffix(".answers.jsonl"), fresh)
    except ValueError as error:
        raise BenchError(str(error)) from None
    table = show.table(sweep, found, len(cases.cases))
    best = show.advised(found)
    advice = _advice(asked, sweep, found, best)
    console.print(table.rich())
    console.print(advice, highlight=False, soft_wrap=True)
    picture = json.with_suffix(".png")
    caption = (
        f"{asked.subject()['model']}, {len(cases.cases)} prompts of {asked.length:,} tokens, "
        f"{asked.budget:.1%} of the cache asked for; {cpu_model()}"
    )
    show.plot(sweep, found, agree, picture, caption)
    write_report(
        json,
        asked.engine_threads,
        {**asdict(asked), **asked.subject()},
        bench="tune",
        title=table.title,
        tables=[table],
        plots=[picture],
        notes=[advice],
        overlaps=agree.tolist(),
        advised=best.candidate.settings if best else None,
    )
    typer.echo(f"{json} and beside it {picture.name}, answers", err=True)
    if best is None:
        raise typer.Exit(NONE_GOOD)


def _advice(asked: Asked, sweep: "Sweep", found: "Sequence[Tried]", best: "Tried | None") -> str:
    if best is None:
        most = max(found, key=lambda each: each.score)
        return (
            f"none of these keeps 98 % of the full cache's score; the best, {sweep.setting} "
            f"{most.candidate.label}, has {most.score:.1%} of its {most.full:.1%}. Give the preset "
            "more (a lower rate, a higher tsp_rate), or take another."
        )
    settings = dumps(best.candidate.settings)
    return (
        f"recommended: {sweep.setting} {best.candidate.label} ({best.score:.1%} right, full cache "
        f"{best.full:.1%}; {best.candidate.work:.0%} {sweep.work_title})\n"
        f"vllm serve MODEL --kv-compress {asked.preset.name} --kv-compress-config '{settings}'"
    )
