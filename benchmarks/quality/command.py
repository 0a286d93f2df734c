"""`vllm-kvcompress bench quality`."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_kvcompress.bench.engine import BLOCK_TOKENS, MODEL
from vllm_kvcompress.bench.errors import BenchError
from vllm_kvcompress.bench.harness import model_name, write_report
from vllm_kvcompress.bench.options import ListCommand, ModelsDtype, Threads, existing_model
from vllm_kvcompress.bench.peers.spec import PeerSpec
from vllm_kvcompress.bench.quality import judge, plots, show
from vllm_kvcompress.bench.quality.case import Case
from vllm_kvcompress.bench.quality.encode import LocalEncoder, encoded
from vllm_kvcompress.bench.quality.phases import Options, Policies, phases
from vllm_kvcompress.bench.quality.prompts_file import read_prompts
from vllm_kvcompress.bench.quality.rows import Outcome, Row, cells
from vllm_kvcompress.bench.quality.run import Plan, run
from vllm_kvcompress.bench.quality.store import Store
from vllm_kvcompress.bench.quality.tasks import make_cases, task_help
from vllm_kvcompress.bench.terminal import show_results, terminal

BUDGETS = (0.5, 0.25, 0.125, 0.0625, 0.03125)
INTERRUPTED = 130
EPILOG = task_help()


class Question(StrEnum):
    """Whether the question stands in the prompt when its cache is compressed."""

    seen = "seen"
    unseen = "unseen"
    both = "both"

    def modes(self) -> list[bool]:
        return {"seen": [False], "unseen": [True], "both": [False, True]}[self]


app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command(cls=ListCommand, epilog=EPILOG)
def main(
    model: Annotated[
        str,
        typer.Option(
            help="A model folder or Hugging Face id.", show_default="the shipped demo model"
        ),
    ] = str(MODEL),
    policies: Annotated[
        list[str] | None,
        typer.Option(help="Presets or files of presets; default: all but continual ones."),
    ] = None,
    budgets: Annotated[
        list[float] | None,
        typer.Option(help="Shares of the prompt's cache to hold; default 1/2 to 1/32."),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            help="Tasks or groups of them, below. Default: demo for the demo model, else ruler."
        ),
    ] = None,
    lengths: Annotated[
        list[int] | None, typer.Option(help="Prompt lengths in tokens; default 1024.")
    ] = None,
    depths: Annotated[
        list[float] | None, typer.Option(help="Of grid tasks: 0 is first, 1 right at the end.")
    ] = None,
    n: Annotated[int, typer.Option(min=1, help="Prompts of each task and length.")] = 100,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    prompts: Annotated[
        list[Path] | None,
        typer.Option(
            help="Your own cases instead: a JSON object a line with prompt, answer and, "
            "as you like, task, length, depth, max_tokens, match."
        ),
    ] = None,
    longbench_path: Annotated[
        Path | None,
        typer.Option(help="LongBench's files, where the Hugging Face hub is out of reach."),
    ] = None,
    question: Annotated[
        Question,
        typer.Option(help="Compress with the question in sight, before it is seen, or both."),
    ] = Question.seen,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            help="kvpress:SnapKVPress, kvpress:AdaKVPress(press=SnapKVPress) ...: run it "
            "in an environment of its own, made on first use."
        ),
    ] = None,
    fp8: Annotated[bool, typer.Option(help="A row for vLLM's fp8 KV cache.")] = True,
    url: Annotated[
        str, typer.Option(help="Ask this server, started with --kv-compress, not an engine here.")
    ] = "",
    served_model: Annotated[str, typer.Option(help="With --url: its name there.")] = "",
    api_key: Annotated[str, typer.Option(envvar="VLLM_API_KEY", help="With --url.")] = "",
    concurrency: Annotated[
        int, typer.Option(min=1, max=1024, help="Requests at once; 1 repeats to the last token.")
    ] = 64,
    block_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a block.")] = BLOCK_TOKENS,
    cache_blocks: Annotated[int, typer.Option(min=0, help="0: enough.")] = 0,
    dtype: ModelsDtype = "",
    threads: Threads = 0,
    json: Annotated[
        Path, typer.Option(help="The report; beside it CSV, plots, and every answer.")
    ] = Path("results/quality.json"),
    fresh: Annotated[bool, typer.Option(help="Drop the answers of an earlier run.")] = False,
) -> None:
    """What a model still answers right when its cache is compressed.

    Every case is answered by plain vLLM, by vLLM with an fp8 cache, by each policy at each budget
    in the running engine, and by the peers you name: same prompts, same scoring, greedy.
    Read the tables by columns: a column is a share of the prompt's cache that was *really held*,
    whole pages and the partly filled block included; peers are held to the same number of tokens.
    `-` stands where whole pages cannot get so low: use longer prompts or smaller blocks.

    The first word of an answer comes from the prefill, which no policy compresses; it is what
    follows that shows what was lost. Short answers flatter every policy. `--question unseen`
    compresses before the question is known: the hard case, and the one of stored contexts.

    Interrupted, the same command goes on where it stopped. Exit code 0: done; 2: it could not.

    Example: `vllm-kvcompress bench quality --n 20 --policies kv-compress snapkv --budgets 0.125`
    """
    if not dtype:
        dtype = "float32" if model == str(MODEL) else "auto"
    if not url:
        existing_model(model)
    try:
        options = Options(
            model=model,
            dtype=dtype,
            threads=threads or len(os.sched_getaffinity(0)),
            at_once=concurrency,
            block_tokens=block_tokens,
            cache_blocks=cache_blocks,
            policies=Policies.of(policies or [], budgets or BUDGETS),
            peers=[PeerSpec.parse(text) for text in peer or []],
            fp8=fp8,
        )
        with server_of(url, api_key, served_model, concurrency) as server:
            encoder = server or LocalEncoder(model)
            if server is not None:
                options.model = model if served_model else server.model
                options.block_tokens = server.block_tokens
            made, notes = cases_of(
                prompts or [],
                partial(
                    make_cases,
                    tasks or ["demo" if model == str(MODEL) and not url else "ruler"],
                    lengths or [1024],
                    depths or [],
                    n,
                    seed,
                    lambda text: len(encoder.plain_ids(text, False)),
                    longbench_path=longbench_path,
                    model_tokens=encoder.max_model_len,
                ),
            )
            kept, tokens, longest = encoded(made, encoder)
            if len(kept) < len(made):
                dropped = len(made) - len(kept)
                notes.append(f"{dropped} cases are longer than the model's context: left out")
            for note in notes:
                typer.echo(note, err=True)
            if not kept:
                raise BenchError("no case to ask")
            plan = Plan(
                kept, tokens, question.modes(), options.block_tokens, options.policies.presets
            )
            todo = phases(options, server, longest)
            subject = {
                "model": model_name(model) if not url else f"{server.model} at {url}",
                "dtype": dtype,
                "block_tokens": options.block_tokens,
            }
            parameters = dict(
                tasks=tasks, lengths=lengths, n=n, seed=seed, concurrency=concurrency, **subject
            )
            with Store(json.with_suffix(".answers.jsonl"), subject, fresh) as store:
                absent: dict[str, str] = {}
                try:
                    absent = run(plan, todo, store)
                finally:
                    rows = [row for phase in todo for row in phase.rows]
                    if store.outcomes:
                        report(plan, rows, store, absent, options, parameters, json, notes)
    except ValueError as error:
        raise BenchError(str(error)) from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise BenchError(f"{where}{error.strerror}") from None
    except KeyboardInterrupt:
        typer.echo("stopped; the same command goes on from here", err=True)
        raise typer.Exit(INTERRUPTED) from None


@contextmanager
def server_of(url: str, api_key: str, model: str, at_once: int) -> Iterator[Any]:
    """The server to ask, or None for an engine here."""
    if not url:
        yield None
        return
    from vllm_kvcompress.bench.quality.server import Server

    with Server(url, api_key, model, at_once) as server:
        yield server


def cases_of(files: Sequence[Path], make: Callable[[], list[Case]]) -> tuple[list[Case], list[str]]:
    """The cases of the files, else those made; and what to tell of lines that are none."""
    if not files:
        return make(), []
    cases, notes = [], []
    for path in files:
        found, bad = read_prompts(path)
        cases += found
        notes += [f"{path}: {line}" for line in bad]
    return list({case.key: case for case in cases}.values()), notes


def report(
    plan: Plan,
    rows: Sequence[Row],
    store: Store,
    absent: Mapping[str, str],
    options: Options,
    parameters: Mapping[str, Any],
    path: Path,
    notes: Sequence[str],
) -> None:
    """Print the tables and verdicts; write JSON, CSV and plots."""
    outcomes: list[Outcome] = list(store.outcomes.values())
    found = cells(plan.cases, rows, plan.modes, outcomes, absent)
    summaries = [show.mean_table(found), show.paired_table(found)]
    tables = [*show.quality_tables(found), *(table for table in summaries if table)]
    judged = judge.verdicts(found)
    show_results(terminal(140), tables, judged)
    drawn = []
    for name, draw in {
        "": partial(plots.accuracy_over_held_share, found),
        ".tasks": partial(plots.bars_per_task, found, _middle(options.policies.budgets)),
        ".depths": partial(plots.heat_map, plan.cases, _shown_over_depth(rows), outcomes),
    }.items():
        picture = path.with_name(f"{path.stem}{name}.png")
        if draw(picture):
            drawn.append(picture)
    flat = show.flat_table(found)
    write_report(
        path,
        options.threads,
        parameters,
        bench="quality",
        title="What is still answered right",
        tables=tables,
        plots=drawn,
        verdicts=judged,
        notes=list(notes),
        cells=[dict(zip(flat.columns, row, strict=True)) for row in flat.rows],
    )
    flat.write_csv(path.with_suffix(".csv"))
    typer.echo(f"{path} and beside it {', '.join(p.name for p in drawn)}, CSV, answers", err=True)


def _middle(budgets: Sequence[float]) -> float:
    return sorted(budgets)[len(budgets) // 2]


def _shown_over_depth(rows: Sequence[Row]) -> list[Row]:
    """The full cache, and the first policies at the middle budget."""
    wished = [row.budget for row in rows if row.budget is not None]
    middle = _middle(wished) if wished else None
    return [row for row in rows if row.budget in (None, middle)][:6]
