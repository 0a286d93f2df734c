"""What a store saves: the second server's first token of a context that the first one computed."""

import json as jsonlib
import os
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import httpx
import typer

from vllm_kvcompress.bench.demo_model.language import many_facts_task
from vllm_kvcompress.bench.engine import BLOCK_TOKENS, FIRST_WORD, MODEL, environment
from vllm_kvcompress.bench.errors import BenchError
from vllm_kvcompress.bench.flops import Decoder
from vllm_kvcompress.bench.harness import Summary, Verdict, paired_ratio, write_report
from vllm_kvcompress.bench.options import BenchCommand, Dtype, Hidden, Threads, existing_model
from vllm_kvcompress.bench.progress import progress_bar
from vllm_kvcompress.bench.table import Table
from vllm_kvcompress.bench.terminal import conclude, show_results, terminal
from vllm_kvcompress.bench.vllm_server import CannotStart, VllmServer

OUTPUT_TOKENS = 16
LAST_WORD = 9000  # most vocabularies are larger
AT_MOST = 0.5
TIMEOUT_S = 300.0
SETTLE_S = 120.0
STATS = "/v1/kv_compress/stats"
STORED = "vllm:cachegen_stored_chunks_total"
COLUMNS = ("second server", "first token ms", "x recompute", "answers as recomputed")
PARTS = ("waiting", "fetching", "decoding", "computing the rest")


@dataclass(frozen=True)
class Said:
    """One streamed answer."""

    first_token_s: float
    text: str


@dataclass
class Round:
    """One context: computed by the first server, then loaded and recomputed by the second."""

    first: Said
    loaded: Said
    recomputed: Said
    parts_ms: dict[str, float] = field(default_factory=dict)  # of the loaded one


@contextmanager
def answering(url: httpx.URL) -> Iterator[None]:
    """Raises BenchError where the server does not."""
    try:
        yield
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise BenchError(f"no answer from {url}: {error}") from None


class Client:
    """Asks one server. All of it raises BenchError where none answers."""

    def __init__(self, url: str, model: str, api_key: str = "") -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=TIMEOUT_S)
        self._model = model or self._get("/v1/models").json()["data"][0]["id"]

    def _get(self, path: str) -> httpx.Response:
        with answering(self._http.base_url):
            return self._http.get(path)

    def ask(self, prompt: Sequence[int], tokens: int = OUTPUT_TOKENS, **more: Any) -> Said:
        """A greedy completion. Raises BenchError with the server's words where it refuses."""
        body = {
            "model": self._model,
            "prompt": list(prompt),
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
            **more,
        }
        began, first, text = time.perf_counter(), None, []
        with (
            answering(self._http.base_url),
            self._http.stream("POST", "/v1/completions", json=body) as answer,
        ):
            if answer.is_error:
                raise BenchError(answer.read().decode()[:500])
            for line in answer.iter_lines():
                if not line.startswith("data: {"):
                    continue
                choices = jsonlib.loads(line.removeprefix("data: ")).get("choices")
                first = first or time.perf_counter()
                text += [choice["text"] for choice in choices or ()]
        return Said((first or time.perf_counter()) - began, "".join(text))

    def stored_chunks(self) -> float:
        """Chunks it has put into the store; figures come with engine steps, so it takes one."""
        self.ask([FIRST_WORD], tokens=1)
        lines = self._get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(STORED))

    def wait_until_stored(self, chunks: float) -> None:
        """Raises BenchError where they never are."""
        give_up = time.monotonic() + SETTLE_S
        while self.stored_chunks() < chunks:
            if time.monotonic() > give_up:
                raise BenchError(f"{chunks:g} chunks are not in the store after {SETTLE_S:g} s")
            time.sleep(0.1)

    def last_timeline(self) -> dict[str, Any]:
        """Of the last request that was loaded for; empty on a server that tells none."""
        self.ask([FIRST_WORD], tokens=1)
        stats = self._get(STATS)
        told = stats.json().get("cachegen_timelines") if stats.is_success else None
        return told[-1] if told else {}


def parts_of(timeline: dict[str, Any]) -> dict[str, float]:
    """Milliseconds before the first fetch; fetching and decoding, which overlap; computing."""
    by_event: dict[str, list[list[float]]] = {}
    for mark in timeline.get("marks", ()):
        by_event.setdefault(mark["event"], []).append(mark["ms"])
    if "fetch" not in by_event:
        return {}
    spent = {event: sum(end - begin for begin, end in spans) for event, spans in by_event.items()}
    waiting = min(begin for begin, _ in by_event["fetch"])
    times = (waiting, spent["fetch"], spent.get("decode", 0), spent.get("compute", 0))
    return dict(zip(PARTS, times, strict=True))


def contexts(model: str, tokens: int, seed: int) -> Iterator[list[int]]:
    """Endless token ids: the demo model's own language, or any words."""
    rng = random.Random(seed)
    if model != str(MODEL):
        while True:
            yield rng.choices(range(FIRST_WORD, LAST_WORD), k=tokens)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    while True:
        yield tokenizer.encode(many_facts_task(rng, tokens + 64, 4).prompt).ids[-tokens:]


@contextmanager
def awake(server: VllmServer | None) -> Iterator[None]:
    """Let a server of ours work inside; others always do."""
    if server is not None:
        server.resume()
    yield
    if server is not None:
        server.pause()


def one_round(
    clients: Sequence[Client],
    servers: Sequence[VllmServer | None],
    context: Sequence[int],
    chunks: int,
    level: int | None,
    number: int,
) -> Round:
    """Loaded and recomputed in turns: in odd rounds the other way round."""
    first, second = clients
    with awake(servers[0]):
        before = first.stored_chunks()
        computed = first.ask(context)
        first.wait_until_stored(before + chunks)
    said: dict[str, Said] = {}
    parts: dict[str, float] = {}
    with awake(servers[1]):
        for way in ("loaded", "recomputed")[:: -1 if number % 2 else 1]:
            before = second.stored_chunks()
            if way == "loaded":
                knobs = {} if level is None else {"vllm_xargs": {"cachegen_level": level}}
                said[way] = second.ask(context, **knobs)
                parts = parts_of(second.last_timeline())
            else:  # a salt of its own keeps vLLM's prefix cache out
                salt = f"{number}-{random.random()}"
                knobs = {"vllm_xargs": {"cachegen_level": 0}}
                said[way] = second.ask(context, cache_salt=salt, **knobs)
                second.wait_until_stored(before + chunks)
    return Round(computed, said["loaded"], said["recomputed"], parts)


def tables(rounds: Sequence[Round]) -> list[Table]:
    recomputed = [r.recomputed.first_token_s for r in rounds]
    loaded = [r.loaded.first_token_s for r in rounds]
    same = sum(r.loaded.text == r.recomputed.text for r in rounds)
    note = f"Medians and ranges of {len(rounds)} rounds, a new context each."
    shown = [
        Table(
            "First token of a context that another server computed",
            COLUMNS,
            [
                ["recomputes", Summary.of(1e3 * s for s in recomputed).text(0), "1", "-"],
                [
                    "loads",
                    Summary.of(1e3 * s for s in loaded).text(0),
                    paired_ratio(loaded, recomputed).text(3),
                    f"{same} of {len(rounds)}",
                ],
            ],
            note,
        )
    ]
    if all(r.parts_ms for r in rounds):
        lines = [[p, Summary.of(r.parts_ms[p] for r in rounds).text(0)] for p in PARTS]
        note = "Fetching and decoding overlap."
        shown.append(Table("Where the time of loading goes", ("part", "ms"), lines, note))
    return shown


app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command(cls=BenchCommand)
def main(
    store: Annotated[str, typer.Option(help="As `--kv-compress-store`; default: a folder.")] = "",
    urls: Annotated[
        str, typer.Option(help="Two running servers that share a store, as `URL,URL`.")
    ] = "",
    api_key: Annotated[str, typer.Option(help="Of both.", envvar="VLLM_API_KEY")] = "",
    model: Annotated[
        str,
        typer.Option(
            callback=existing_model,
            help="A model folder, Hugging Face id, or `demo`; default: random weights.",
        ),
    ] = "",
    layers: Annotated[int, typer.Option(help="Layers of the random weights.", min=2)] = 8,
    hidden: Hidden = 768,
    context_tokens: Annotated[int, typer.Option(help="Tokens of a context.", min=512)] = 4096,
    level: Annotated[
        int | None, typer.Option(help="Stored and loaded; default: the server's.", min=1, max=4)
    ] = None,
    chunk_tokens: Annotated[int, typer.Option(help="As the servers'.", min=32)] = 256,
    rounds: Annotated[int, typer.Option(help="Contexts measured.", min=1)] = 5,
    threads: Threads = 0,
    dtype: Dtype = "float32",
    eager: Annotated[bool, typer.Option(help="Without torch.compile.")] = True,
    seed: Annotated[int, typer.Option(help="Of the contexts.")] = 0,
    json: Annotated[Path, typer.Option(help="The report.")] = Path("results/reuse.json"),
) -> None:
    """How soon a second server answers a context that the first one computed.

    Two `vllm serve --kv-compress cachegen` share a store. In each round the first computes a new
    context and stores it; the second loads it, and recomputes it, in turns, each time as if it
    had never seen it. The servers that wait are stopped. With `--urls` two running servers are
    asked instead, and nothing else should be asked of them.

    Exit code 1 where loading takes more than half of recomputing, or says something else.

    Example: `vllm-kvcompress bench reuse --model demo --store redis://localhost:6379`
    """
    threads = threads or len(os.sched_getaffinity(0))
    model = str(MODEL) if model == "demo" else model
    chunks = context_tokens // chunk_tokens
    with ExitStack() as stack:
        progress = stack.enter_context(progress_bar())
        bar = progress.add_task("starting two servers", total=rounds + 1)
        servers: list[VllmServer | None] = [None, None]
        if urls:
            asked = urls.split(",")
            if len(asked) != 2:
                raise typer.BadParameter("--urls takes two, as http://one:8000,http://two:8000")
            clients = [Client(url, model, api_key) for url in asked]
        else:
            store = store or stack.enter_context(TemporaryDirectory(prefix="kv-store-"))
            decoder = Decoder.llama(layers, hidden)
            folder = model or stack.enter_context(decoder.folder(context_tokens + 256))
            arguments = [folder, "--dtype", dtype, "--max-model-len", str(context_tokens + 64)]
            arguments += ["--load-format", "auto" if model else "dummy"]
            arguments += ["--block-size", str(BLOCK_TOKENS), "--kv-compress", "cachegen"]
            arguments += ["--kv-compress-store", store, "--max-num-seqs", "4"]
            arguments += ["--enforce-eager"] if eager else []
            settings = {"chunk_tokens": chunk_tokens, **({"levels": [level]} if level else {})}
            arguments += ["--kv-compress-config", jsonlib.dumps({"cachegen": settings})]
            variables = environment(threads)
            variables.pop("VLLM_ENABLE_V1_MULTIPROCESSING")
            try:
                servers = [
                    stack.enter_context(VllmServer(name, arguments, variables))
                    for name in ("the first server", "the second server")
                ]
            except CannotStart as error:
                raise BenchError(str(error)) from None
            clients = [Client(server.url, folder) for server in servers if server]
        done = []
        for number, context in zip(
            range(-1, rounds), contexts(model, context_tokens, seed), strict=False
        ):
            what = f"round {number + 1}/{rounds}" if number >= 0 else "warm-up"
            progress.update(bar, description=what)
            result = one_round(clients, servers, context, chunks, level, number)
            done += [result] if number >= 0 else []
            progress.advance(bar)
    shown = tables(done)
    loaded = [r.loaded.first_token_s for r in done]
    ratio = paired_ratio(loaded, [r.recomputed.first_token_s for r in done])
    same = Summary.of([sum(r.loaded.text == r.recomputed.text for r in done) / rounds])
    judged = [
        Verdict("first token, loaded over recomputed", ratio, AT_MOST, at_most=True),
        Verdict("answers as recomputed", same, 1),
    ]
    console = terminal()
    show_results(console, shown, judged)
    write_report(
        json,
        threads,
        {
            "model": model or f"random weights, {layers} layers of width {hidden}",
            "store": store.partition(":")[0] if "://" in store else "folder",
            "context_tokens": context_tokens,
            "level": level,
            "chunk_tokens": chunk_tokens,
            "dtype": dtype,
            "eager": eager,
            "urls": urls,
        },
        bench="reuse",
        title="First token of a context that another server computed",
        tables=shown,
        verdicts=judged,
        rounds=[asdict(r) for r in done],
    )
    conclude(console, [json], judged)


if __name__ == "__main__":
    app()
