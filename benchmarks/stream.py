"""The streaming policy at work: which levels it takes on a line whose bandwidth steps."""

import json as jsonlib
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import httpx
import typer

from vllm_kvcompress.bench.charts import COLOURS, panels, save
from vllm_kvcompress.bench.engine import BLOCK_TOKENS, environment
from vllm_kvcompress.bench.errors import BenchError
from vllm_kvcompress.bench.flops import Decoder
from vllm_kvcompress.bench.harness import Summary, Verdict, cpu_model, write_report
from vllm_kvcompress.bench.options import Hidden, ListCommand, Threads
from vllm_kvcompress.bench.progress import progress_bar
from vllm_kvcompress.bench.reuse import STATS, Client, contexts
from vllm_kvcompress.bench.table import Table
from vllm_kvcompress.bench.terminal import conclude, show_results, terminal
from vllm_kvcompress.bench.vllm_server import CannotStart, VllmServer

LEVELS = (1, 2, 3, 4)
LEVEL_COLOURS = dict(zip(LEVELS, COLOURS, strict=False))
LANES = {"fetch": 2, "decode": 1, "compute": 0}
NARROW = 0.012  # of the whole time; a thinner bar has no number
REST_S = 1.5  # the throttled line then begins with its first rate
DRAWN = 4  # requests of a running server
COLUMNS = ("asked for", "first token ms", "levels of the chunks")
Timeline = Mapping[str, Any]


def levels_of(timeline: Timeline) -> str:
    """`2 4 4 1`: the levels fetched, in order; a dot where the rest was recomputed."""
    marks = timeline["marks"]
    fetched = sorted((m["tokens"][0], m["level"]) for m in marks if m["event"] == "fetch")
    chunk = max(
        (m["tokens"][1] - m["tokens"][0] for m in marks if m["event"] == "fetch"), default=1
    )
    rest = [m for m in marks if m["event"] == "compute" and m["tokens"][1] - m["tokens"][0] > chunk]
    return " ".join([*(str(level) for _, level in fetched), *("recomputed" for _ in rest[:1])])


def title_of(timeline: Timeline) -> str:
    target, token = timeline["target_ms"], timeline["first_token_ms"]
    asked = f"target {target:,.0f} ms, " if target else ""
    return f"{asked}first token after {token:,.0f} ms" if token else f"{asked}no first token yet"


def plot(timelines: Sequence[Timeline], path: Path, caption: str) -> None:
    """A panel per request: fetching, decoding and computing over time, coloured by level."""
    figure, axes = panels(len(timelines), columns=1)
    for axis, timeline in zip(axes, timelines, strict=True):
        for mark in timeline["marks"]:
            begin, end = mark["ms"]
            lane, colour = LANES[mark["event"]], LEVEL_COLOURS.get(mark["level"], "#6b7078")
            axis.barh(lane, end - begin, left=begin, height=0.7, color=colour, ec="white", lw=0.5)
            if mark["event"] == "fetch" and end - begin > NARROW * (
                timeline["first_token_ms"] or end
            ):
                middle = (begin + end) / 2
                axis.text(middle, lane + 0.42, str(mark["level"]), ha="center", fontsize=7.5)
        if timeline["first_token_ms"]:
            axis.axvline(timeline["first_token_ms"], color="#222222", lw=1.2)
        if timeline["target_ms"]:
            axis.axvline(timeline["target_ms"], color="#c0392b", lw=1.2, ls="--")
        axis.set_yticks(list(LANES.values()), ["transfer", "decode", "compute"])
        axis.set_ylim(-0.5, 2.8)
        axis.set_xlim(left=0)
        axis.set_title(title_of(timeline), loc="left")
    axes[-1].set_xlabel("ms since the request; line: first token, dashed: target")
    for level, colour in LEVEL_COLOURS.items():
        axes[0].barh(0, 0, color=colour, label=f"level {level}")
    axes[0].legend(frameon=False, ncols=2, fontsize=8, loc="lower left")
    save(figure, path, caption)


def verdicts(fixed: Mapping[int, float], met: Mapping[float, float]) -> list[Verdict]:
    """Every target that some level throughout meets is met, in the server's own time."""
    return [
        Verdict(f"first token, target {target:g} ms", Summary.of([got]), target, at_most=True)
        for target, got in met.items()
        if min(fixed.values()) <= target
    ]


def last_timelines(url: str, api_key: str) -> list[Timeline]:
    """Of the last requests that a running server has loaded for.

    Raises:
        typer.BadParameter: no server with a store answers there.
        BenchError: it has loaded nothing yet.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        answer = httpx.get(url.rstrip("/") + STATS, headers=headers).raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise typer.BadParameter(f"no figures of a store from {url}: {error}") from None
    told: list[Timeline] = answer.json().get("cachegen_timelines") or []
    if not told:
        raise BenchError("this server has loaded nothing yet")
    return told[-DRAWN:]


app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command(cls=ListCommand)
def main(
    gbps: Annotated[
        list[float] | None, typer.Option(help="The line's rates in turn (default 2 0.2 1).")
    ] = None,
    step_mb: Annotated[float, typer.Option(help="Megabytes between them.", min=0.01)] = 8,
    targets: Annotated[
        list[float] | None,
        typer.Option(help="Targets for the first token in ms (default 500 700 1000)."),
    ] = None,
    url: Annotated[
        str, typer.Option(help="Draw what this server streamed last instead, and ask nothing.")
    ] = "",
    api_key: Annotated[str, typer.Option(help="Of --url.", envvar="VLLM_API_KEY")] = "",
    layers: Annotated[int, typer.Option(help="Layers of the random weights.", min=2)] = 8,
    hidden: Hidden = 768,
    context_tokens: Annotated[int, typer.Option(help="Tokens of the context.", min=512)] = 4096,
    threads: Threads = 0,
    json: Annotated[Path, typer.Option(help="The report; the picture goes beside it.")] = Path(
        "results/stream.json"
    ),
) -> None:
    """Which level the streaming policy takes of each chunk, and whether the target is met.

    A `vllm serve --kv-compress cachegen` stores one context at all levels, and loads it again
    through a throttled line: at every fixed level, then with each target. The picture shows
    transfer, decoding and computing up to the first token. With `--url`, that of a server's last
    requests.

    Exit code 1 where a target is missed that some fixed level meets.

    Example: `vllm-kvcompress bench stream --gbps 2 0.2 1 --targets 500 700 1000`
    """
    threads = threads or len(os.sched_getaffinity(0))
    console, picture = terminal(), json.with_suffix(".png")
    if url:
        plot(last_timelines(url, api_key), picture, f"the last requests loaded by {url}")
        conclude(console, [picture], ())
        return
    rates, wanted = gbps or [2, 0.2, 1], targets or [500, 700, 1000]
    timelines: dict[float, Timeline] = {}
    with ExitStack() as stack:
        folder = stack.enter_context(Decoder.llama(layers, hidden).folder(context_tokens + 64))
        kept = stack.enter_context(TemporaryDirectory(prefix="kv-store-"))
        line = f"gbps={','.join(f'{rate:g}' for rate in rates)}&step_mb={step_mb:g}"
        arguments = [folder, "--load-format", "dummy", "--dtype", "float32", "--enforce-eager"]
        arguments += ["--max-model-len", str(context_tokens + 32), "--no-enable-prefix-caching"]
        arguments += ["--block-size", str(BLOCK_TOKENS), "--kv-compress", "cachegen"]
        arguments += ["--kv-compress-store", f"{kept}?{line}"]
        arguments += ["--kv-compress-config", jsonlib.dumps({"cachegen": {"levels": LEVELS}})]
        variables = environment(threads)
        variables.pop("VLLM_ENABLE_V1_MULTIPROCESSING")
        progress = stack.enter_context(progress_bar())
        bar = progress.add_task("starting the server", total=2 + len(LEVELS) + len(wanted))
        try:
            server = stack.enter_context(VllmServer("the server", arguments, variables))
        except CannotStart as error:
            raise BenchError(str(error)) from None
        server.resume()
        client = Client(server.url, folder)
        context = next(contexts("", context_tokens, 0))
        progress.update(bar, advance=1, description="computing and storing")
        client.ask(context, tokens=1)
        client.wait_until_stored(len(LEVELS) * (context_tokens // 256))

        def load(what: str, **knobs: float) -> Timeline:
            progress.update(bar, advance=1, description=what)
            time.sleep(REST_S)
            client.ask(context, tokens=1, vllm_xargs=knobs)
            return client.last_timeline()

        load("warm-up", cachegen_level=LEVELS[0])
        fixed = {level: load(f"level {level}", cachegen_level=level) for level in LEVELS}
        for target in wanted:
            timelines[target] = load(f"target {target:g} ms", cachegen_ttft_ms=target)
    rows = [
        [f"level {level}", f"{t['first_token_ms']:,.0f}", levels_of(t)]
        for level, t in fixed.items()
    ]
    rows += [
        [f"{target:g} ms", f"{t['first_token_ms']:,.0f}", levels_of(t)]
        for target, t in timelines.items()
    ]
    steps = ", then ".join(f"{rate:g} Gbps" for rate in rates)
    note = f"{steps}, after {step_mb:g} MB each; {context_tokens:,} tokens, random weights."
    shown = Table("First token through a line whose bandwidth steps", COLUMNS, rows, note)
    judged = verdicts(
        {level: t["first_token_ms"] for level, t in fixed.items()},
        {target: t["first_token_ms"] for target, t in timelines.items()},
    )
    show_results(console, [shown], judged)
    caption = f"{note} {threads} thread(s) of {cpu_model()}"
    plot(list(timelines.values()), picture, caption)
    write_report(
        json,
        threads,
        {
            "gbps": rates,
            "step_mb": step_mb,
            "layers": layers,
            "hidden": hidden,
            "context_tokens": context_tokens,
        },
        bench="stream",
        title="The streaming policy on a line whose bandwidth steps",
        tables=[shown],
        plots=[picture],
        verdicts=judged,
        fixed=fixed,
        timelines=list(timelines.values()),
    )
    conclude(console, [json, picture], judged)


if __name__ == "__main__":
    app()
