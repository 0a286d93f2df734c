"""Latency and throughput over HTTP: vLLM's own `vllm bench serve`, against one server per row."""

import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_kvcompress.bench.engine import BLOCK_TOKENS, MODEL, environment
from vllm_kvcompress.bench.errors import BenchError
from vllm_kvcompress.bench.harness import cpu_model, write_report
from vllm_kvcompress.bench.options import MOST_SEED, Dtype, ListCommand, Threads, existing_model
from vllm_kvcompress.bench.process import ProcessEnded
from vllm_kvcompress.bench.progress import progress_bar
from vllm_kvcompress.bench.serve_client import BenchFailed, Load, Run, Target, look, run
from vllm_kvcompress.bench.serve_report import plot, tables, verdicts
from vllm_kvcompress.bench.terminal import conclude, show_results, terminal
from vllm_kvcompress.bench.variants import ALL_OFF, Engine, Variant, variants
from vllm_kvcompress.bench.vllm_server import VLLM, CannotStart, VllmServer, free_port

FP8_BLOCKS = {"float32": 4}  # in the bytes of one block; other dtypes take two bytes an element


@dataclass
class Serving:
    """What asks are sent to: a row's target, and the server to wake for it, if it is ours."""

    target: Target
    server: VllmServer | None = None

    @contextmanager
    def awake(self) -> Iterator[Target]:
        """Let the server work inside. Raises ProcessEnded when it has died."""
        if self.server is None:
            yield self.target
            return
        self.server.resume()
        try:
            yield self.target
        except BenchFailed:
            self.server.check()  # why it failed, if that is why
            raise
        self.server.pause()


@dataclass(frozen=True)
class Serve:
    """How all servers are started."""

    model: str
    cache_blocks: int
    max_model_len: int
    max_seqs: int
    batched_tokens: int
    dtype: str
    eager: bool
    extra: Sequence[str] = field(default_factory=list)

    def arguments(self, engine: Engine) -> list[str]:
        blocks = self.cache_blocks
        if engine.kv_cache_dtype == "fp8":
            blocks *= FP8_BLOCKS.get(self.dtype, 2)
        out = [self.model, "--dtype", self.dtype, "--max-model-len", str(self.max_model_len)]
        out += ["--block-size", str(BLOCK_TOKENS), "--num-gpu-blocks-override", str(blocks + 1)]
        out += ["--max-num-seqs", str(self.max_seqs)]
        out += ["--max-num-batched-tokens", str(self.batched_tokens)]
        out += ["--enforce-eager"] if self.eager else []
        if engine.kv_cache_dtype != "auto":
            out += ["--kv-cache-dtype", engine.kv_cache_dtype]
        if engine.kv_compress is not None:
            out += ["--kv-compress", str(engine.kv_compress["preset"])]
        return [*out, *self.extra]


@contextmanager
def started(
    rows: Sequence[Variant],
    how: Serve,
    threads: int,
    port: int,
    start_s: float,
    refused: dict[str, str],
    tell: Callable[[str], Any],
    command: Sequence[str] = VLLM,
) -> Iterator[dict[str, Serving]]:
    """A server per engine of the rows, by the rows' names; what does not start is `refused`.

    Raises:
        BenchError: a port is taken, or the first row's server does not start.
    """
    settings = environment(threads)
    settings.pop("VLLM_ENABLE_V1_MULTIPROCESSING")  # a server has its engine in another process
    found: dict[Engine, Serving] = {}
    words: dict[Engine, str] = {}
    engines = list(dict.fromkeys(row.engine for row in rows))
    ports = [free_port(port + i) if port else 0 for i in range(len(engines))]
    with ExitStack() as stack:
        for engine, own_port in zip(engines, ports, strict=True):
            tell(f"starting the server of {engine.name}")
            plugins = environment(threads, engine.plugin)["VLLM_PLUGINS"]
            server = VllmServer(
                engine.name,
                how.arguments(engine),
                {**settings, "VLLM_PLUGINS": plugins},
                own_port,
                start_s,
                command,
            )
            try:
                stack.enter_context(server)
            except CannotStart as error:
                if engine == rows[0].engine:
                    raise BenchError(str(error)) from None
                words[engine] = error.reason
                continue
            found[engine] = Serving(Target(server.url, how.model, how.model), server)
        refused.update({row.name: words[row.engine] for row in rows if row.engine in words})
        yield {row.name: found[row.engine] for row in rows if row.engine in found}


def measure(
    rows: Sequence[Variant],
    serving: Mapping[str, Serving],
    loads: Sequence[Load],
    rounds: int,
    seed: int,
    refused: dict[str, str],
    tell: Callable[[str], Any],
    command: Sequence[str] = VLLM,
) -> dict[float, dict[str, list[Run]]]:
    """Rounds of every row at every load, taking turns; a few requests warm each server up.

    Raises:
        BenchError: the first row, with which all are compared, failed.
    """
    samples: dict[float, dict[str, list[Run]]] = {}
    for place, load in enumerate(loads):
        samples[load.request_rate] = {row.name: [] for row in rows if row.name not in refused}
        for number in range(-1 if place == 0 else 0, rounds):
            turn = number % len(rows)
            for row in [*rows[turn:], *rows[:turn]]:
                if row.name in refused:
                    continue
                tell(f"{'warm-up' if number < 0 else f'round {number + 1}/{rounds}'}: {row.name}")
                sent = replace(load, prompts=min(4, load.prompts)) if number < 0 else load
                own_seed = seed + (number + 1) * len(rows) + rows.index(row)
                try:
                    with serving[row.name].awake() as target:
                        done = run(target, sent, own_seed, row.asks, command)
                except (ProcessEnded, BenchFailed) as error:
                    if row is rows[0]:
                        raise BenchError(f"{row.name}: {error}") from None
                    refused[row.name] = str(error)
                    for runs in samples.values():
                        runs.pop(row.name, None)
                    continue
                if number >= 0:
                    samples[load.request_rate][row.name].append(done)
    return samples


app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command(cls=ListCommand)
def main(
    rates: Annotated[
        list[float] | None, typer.Option(help="Compression rates above 1 (default 2 8).")
    ] = None,
    presets: Annotated[
        list[str] | None, typer.Option(help="Presets, each at every rate (default kv-compress).")
    ] = None,
    url: Annotated[
        str, typer.Option(help="A running `vllm serve --kv-compress` to ask instead.")
    ] = "",
    api_key: Annotated[
        str, typer.Option(help="Of the server at --url.", envvar="VLLM_API_KEY")
    ] = "",
    tokenizer: Annotated[
        str, typer.Option(help="With --url: a folder or name; default: as the server says.")
    ] = "",
    request_rates: Annotated[
        list[float] | None,
        typer.Option(help="Requests per second, a list (default inf: all at once).", min=0.001),
    ] = None,
    max_concurrency: Annotated[
        int, typer.Option(help="Most requests in flight; 0 for any.", min=0)
    ] = 0,
    prompts: Annotated[int, typer.Option(help="Requests per round.", min=1)] = 32,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens per prompt.", min=1)] = 2048,
    output_tokens: Annotated[int, typer.Option(help="Tokens generated each.", min=1)] = 256,
    goodput: Annotated[
        list[str] | None,
        typer.Option(help="Limits in ms, as vLLM's: `--goodput ttft:1000 tpot:100`."),
    ] = None,
    hold: Annotated[
        int, typer.Option(help="Finished requests that the cache holds uncompressed.", min=1)
    ] = 4,
    rounds: Annotated[int, typer.Option(help="Measured rounds of every row.", min=1)] = 3,
    fp8: Annotated[bool, typer.Option(help="A row with --kv-cache-dtype fp8.")] = True,
    off: Annotated[bool, typer.Option(help="A row with kv-compress on, requests off.")] = True,
    threads: Threads = 0,
    model: Annotated[
        str, typer.Option(help="A model folder or Hugging Face id; with --url the served name.")
    ] = "",
    dtype: Dtype = "float32",
    eager: Annotated[bool, typer.Option(help="Without torch.compile.")] = False,
    max_seqs: Annotated[int, typer.Option(help="Most requests in a step.", min=1)] = 128,
    batched_tokens: Annotated[int, typer.Option(help="Token budget of a step.", min=32)] = 2048,
    server_args: Annotated[str, typer.Option(help="More for every `vllm serve`, quoted.")] = "",
    port: Annotated[
        int, typer.Option(help="The first server's, the others follow; 0 for free ones.", min=0)
    ] = 0,
    start_timeout: Annotated[float, typer.Option(help="Seconds a server may start.", min=1)] = 600,
    seed: Annotated[int, typer.Option(help="Of the random prompts.", min=0, max=MOST_SEED)] = 0,
    json: Annotated[Path, typer.Option(help="The report; the plot goes beside it.")] = Path(
        "results/serve.json"
    ),
) -> None:
    """What clients see: `vllm bench serve` against plain vLLM, its fp8 cache, and kv-compress.

    Servers are started once each, with the same cache bytes, and take turns: the ones that wait
    are stopped. Every run sends random prompts of one length to one of them; rates and presets
    go with each request, in `vllm_xargs`. All figures are vLLM's own: **TTFT** time to the first
    token, **TPOT** time per output token after it, **ITL** time between tokens, **goodput**
    requests per second within `--goodput`. **held** and **freed** come from the server's
    `/v1/kv_compress/stats`. The last columns are ratios to plain vLLM in the same round.

    With `--url` the rows are asked of that server, and compared with its own `off` requests.

    Compression shows when requests queue for cache blocks: then TTFT falls most, as they get in
    earlier. At request rates that plain vLLM serves without a queue expect no difference in TTFT
    and TPOT of 1 or slightly more. Exit code 1 where `off` requests get less than 0.8 of plain
    vLLM's tokens/s, or others less than half.

    Example: `vllm-kvcompress bench serve --rates 8 --request-rates 8 --goodput ttft:1000 tpot:100`
    """
    threads = threads or len(os.sched_getaffinity(0))
    if not url:
        existing_model(model)
    try:
        more = shlex.split(server_args)
    except ValueError as error:
        raise typer.BadParameter(f"--server-args {server_args}: {error}") from None
    chosen = rates or [2, 8]
    if any(rate <= 1 for rate in chosen):
        raise typer.BadParameter("rates must be above 1; the row `off` keeps everything")
    for limit in goodput or ():
        if not limit.partition(":")[2].replace(".", "", 1).isdigit():
            raise typer.BadParameter(f"goodput {limit!r} is not as ttft:1000")
    rows = variants(chosen, presets or ["kv-compress"], fp8=fp8, off=off)
    loads = [
        Load(
            prompts,
            prompt_tokens,
            output_tokens,
            rate,
            max_concurrency or None,
            tuple(goodput or ()),
        )
        for rate in sorted(set(request_rates or [float("inf")]))
    ]
    longest = prompt_tokens + output_tokens + 16  # random text may come back longer
    how = Serve(
        model or str(MODEL),
        hold * -(-longest // BLOCK_TOKENS),
        longest,
        min(max_seqs, batched_tokens),
        batched_tokens,
        dtype,
        eager,
        more,
    )
    refused: dict[str, str] = {}
    with ExitStack() as stack:
        progress = stack.enter_context(progress_bar())
        bar = progress.add_task("", total=None)
        if url:
            target = _running(url, model, tokenizer, api_key)
            rows = [ALL_OFF, *(row for row in rows if row.compresses)]
            serving = {row.name: Serving(target) for row in rows}
        else:
            serving = stack.enter_context(
                started(
                    rows,
                    how,
                    threads,
                    port,
                    start_timeout,
                    refused,
                    lambda text: progress.update(bar, description=text),
                )
            )
        progress.update(bar, total=len(serving) * (1 + rounds * len(loads)))
        samples = measure(
            rows,
            serving,
            loads,
            rounds,
            seed,
            refused,
            lambda text: progress.update(bar, advance=1, description=text),
        )

    shown, judged = tables(rows, samples, loads[0], refused, rounds), verdicts(rows, samples)
    console = terminal()
    show_results(console, shown, judged)
    picture = json.with_suffix(".png")
    where = f"server at {url}" if url else f"{threads} thread(s) of {cpu_model()}"
    plot(
        samples,
        picture,
        f"{prompts} requests of {prompt_tokens:,} tokens, {output_tokens} outputs; {where}; "
        f"median and range of {rounds} rounds",
    )
    write_report(
        json,
        threads,
        {**asdict(how), **asdict(loads[0]), "request_rate": None, "url": url, "seed": seed},
        bench="serve",
        title="Latency and throughput over HTTP",
        tables=shown,
        plots=[picture],
        verdicts=judged,
        refused=refused,
        runs=[
            {
                "request_rate": f"{rate:g}",
                "rows": {n: [asdict(r) for r in rs] for n, rs in o.items()},
            }
            for rate, o in samples.items()
        ],
    )
    conclude(console, [json, picture], judged)


def _running(url: str, model: str, tokenizer: str, api_key: str) -> Target:
    """Raises BenchError: nothing there, or without kv-compress."""
    try:
        target = look(url, model, tokenizer, api_key)
        if target.stats() is None:
            raise BenchFailed(f"{url} runs without --kv-compress: start it with that flag")
    except BenchFailed as error:
        raise BenchError(str(error)) from None
    return target


if __name__ == "__main__":
    app()
