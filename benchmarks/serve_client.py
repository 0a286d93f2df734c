"""One run of `vllm bench serve` against a server, and what the server says of it afterwards."""

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from vllm_kvcompress.bench.process import last_words
from vllm_kvcompress.bench.vllm_server import VLLM

STATS = "/v1/kv_compress/stats"
FIGURES_WAIT_S = 10.0
KEPT = (
    "duration completed failed total_input_tokens total_output_tokens request_throughput "
    "request_goodput output_throughput total_token_throughput max_concurrent_requests"
).split()
LATENCIES = ("ttft", "tpot", "itl", "e2el")


class BenchFailed(RuntimeError):
    """`vllm bench serve` did not finish, or requests failed. One line."""


@dataclass(frozen=True)
class Load:
    """What `vllm bench serve` sends: random prompts of one length, outputs of one length.

    goodput: as its option, `("ttft:500", "tpot:50")` in milliseconds; empty for none.
    """

    prompts: int
    prompt_tokens: int
    output_tokens: int
    request_rate: float
    max_concurrency: int | None = None
    goodput: tuple[str, ...] = ()

    def arguments(self) -> list[str]:
        out = ["--dataset-name", "random", "--ignore-eos", "--num-prompts", str(self.prompts)]
        out += ["--random-input-len", str(self.prompt_tokens)]
        out += ["--random-output-len", str(self.output_tokens)]
        out += ["--request-rate", f"{self.request_rate:g}"]
        if self.max_concurrency:
            out += ["--max-concurrency", str(self.max_concurrency)]
        if self.goodput:
            out += ["--goodput", *self.goodput]
        return out


@dataclass(frozen=True)
class Run:
    """The figures of one run.

    figures: of `vllm bench serve`, under its own names, in its units.
    held_share: of the compressed prompts' tokens, right after; None where none was compressed.
    blocks_freed: by compression during the run.
    """

    figures: Mapping[str, float] = field(default_factory=dict)
    held_share: float | None = None
    blocks_freed: int = 0

    def __getitem__(self, name: str) -> float:
        value = self.figures.get(name)
        return float("nan") if value is None else value


@dataclass(frozen=True)
class Target:
    """A server to be asked."""

    url: str
    model: str
    tokenizer: str
    api_key: str = ""

    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    def stats(self) -> dict[str, Any] | None:
        """The figures of kv-compress; None from a server without it.

        Raises:
            BenchFailed: no answer, or not allowed to ask.
        """
        try:
            answer = httpx.get(f"{self.url}{STATS}", headers=self.headers(), timeout=30)
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise BenchFailed(f"no answer from {self.url}: {reason}") from None
        if answer.status_code == 404:
            return None
        if answer.is_error:
            raise BenchFailed(f"{self.url}{STATS} answers {answer.status_code}")
        return dict(answer.json())


def look(url: str, model: str, tokenizer: str, api_key: str) -> Target:
    """A running server, asked what it serves.

    Raises:
        BenchFailed: nothing fit to be asked listens there.
    """
    url = url.rstrip("/").removesuffix("/v1")
    target = Target(url, model, tokenizer, api_key)
    try:
        answer = httpx.get(f"{url}/v1/models", headers=target.headers(), timeout=30)
        answer.raise_for_status()
        served = answer.json()["data"]
    except httpx.HTTPStatusError as error:
        raise BenchFailed(f"{url}/v1/models answers {error.response.status_code}") from None
    except (httpx.HTTPError, ValueError, KeyError) as error:
        raise BenchFailed(
            f"no vLLM server answers at {url}: {error or type(error).__name__}"
        ) from None
    card = next((c for c in served if c["id"] == model or not model), None)
    if card is None:
        raise BenchFailed(f"{url} serves {', '.join(c['id'] for c in served)}, not {model!r}")
    return Target(url, card["id"], tokenizer or card.get("root") or card["id"], api_key)


def run(
    target: Target,
    load: Load,
    seed: int,
    asks: Mapping[str, Any] | None,
    command: Sequence[str] = VLLM,
) -> Run:
    """Send the load and wait for its end.

    Args:
        asks: the requests' `vllm_xargs`; None or empty for none.

    Raises:
        BenchFailed: it did not finish, or a request failed.
    """
    before = target.stats()
    body: dict[str, Any] = {"temperature": 0, **({"vllm_xargs": dict(asks)} if asks else {})}
    with tempfile.TemporaryDirectory() as folder:
        arguments = [*command, "bench", "serve", "--backend", "openai", "--base-url", target.url]
        arguments += ["--model", target.model, "--tokenizer", target.tokenizer]
        arguments += ["--seed", str(seed), "--extra-body", json.dumps(body), "--disable-tqdm"]
        arguments += ["--percentile-metrics", ",".join(LATENCIES), "--metric-percentiles", "99"]
        arguments += ["--save-result", "--result-dir", folder, "--result-filename", "result.json"]
        done = subprocess.run(
            [*arguments, *load.arguments()],
            env={
                **os.environ,
                "VLLM_LOGGING_LEVEL": "ERROR",
                "VLLM_PLUGINS": "",
                "TOKENIZERS_PARALLELISM": "false",
                "OPENAI_API_KEY": target.api_key,
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        path = Path(folder) / "result.json"
        if done.returncode or not path.exists():
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            raise BenchFailed(f"vllm bench serve failed: {last_words(lines)}")
        result = json.loads(path.read_text())
    if result["completed"] < load.prompts:
        raise BenchFailed(f"{load.prompts - result['completed']} of {load.prompts} requests failed")
    figures = {name: result.get(name) for name in KEPT}
    for name in LATENCIES:
        figures |= {f"{k}_{name}_ms": result[f"{k}_{name}_ms"] for k in ("median", "mean", "p99")}
    if before is None:
        return Run(figures)
    after = _settled(target, before, load.prompts)
    prompt_tokens = _grown(before, after, "prompt_tokens")
    held = _grown(before, after, "held_tokens") / prompt_tokens if prompt_tokens else None
    return Run(figures, held, after["blocks_freed"] - before["blocks_freed"])


def _grown(before: Mapping[str, Any], after: Mapping[str, Any], name: str) -> float:
    return float(sum(after[name].values()) - sum(before[name].values()))


def _settled(target: Target, before: Mapping[str, Any], requests: int) -> dict[str, Any]:
    """The statistics once the last requests stand in them, which takes an engine step."""
    give_up = time.monotonic() + FIGURES_WAIT_S
    while True:
        after = target.stats()
        assert after is not None
        if _ended(after) - _ended(before) >= requests or time.monotonic() > give_up:
            return after
        time.sleep(0.1)


def _ended(stats: Mapping[str, Any]) -> int:
    return sum(sum(outcomes.values()) for outcomes in stats["requests"].values())
