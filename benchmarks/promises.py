"""What the ratios to plain vLLM must be, whatever the machine: verdicts on a throughput run.

A fivefold slower build breaks them; two runs of one build, which differ by some percent, do not.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import typer

from vllm_kvcompress.bench.crossover import Point
from vllm_kvcompress.bench.engine import Round
from vllm_kvcompress.bench.harness import Summary, Verdict, paired_ratio
from vllm_kvcompress.bench.variants import PLAIN, Variant
from vllm_kvcompress.presets import read_text

SAME_WORK = 0.9  # two processes of one build were seen 5 % apart
NEVER_BELOW = 0.5
PAYS = 1.0
AS_BEFORE = 0.75

FIGURES: Mapping[str, Callable[[Round], float]] = {
    "total": lambda r: r.total_per_s,
    "decode": lambda r: r.decode_per_s,
    "total_cpu": lambda r: (r.prompt_tokens + r.output_tokens) / r.cpu_s,
    "decode_cpu": lambda r: r.decode_tokens / r.decode_cpu_s if r.decode_cpu_s else float("nan"),
}
WORDS = {"total": "tokens/s", "decode": "decode tokens/s"}

Samples = Mapping[Point, Mapping[str, Sequence[Round]]]
Baseline = Mapping[tuple[Point, str, str], float]
"""(point, row, figure) -> the median ratio to plain vLLM of an earlier run."""


def ratio(rounds: Mapping[str, Sequence[Round]], name: str, figure: str) -> Summary:
    """A row's figure over plain vLLM's, paired round by round."""
    of = FIGURES[figure]
    return paired_ratio([of(r) for r in rounds[name]], [of(r) for r in rounds[PLAIN]])


def verdicts(
    samples: Samples,
    rows: Sequence[Variant],
    crowded: Callable[[Point], bool],
    baseline: Baseline | None = None,
) -> list[Verdict]:
    """Every row of ours at every point of the grid, against what it must reach.

    * Rows that do plain vLLM's work (`off`, `flag off`): 0.9 of its tokens/s, decoding too.
    * All others: never below half of plain vLLM's tokens/s.
    * Rows that compress, where the cache cannot hold all requests at once (`crowded`): decoding
      at least as fast as plain vLLM.
    * With a `baseline`: 0.75 of the ratio that the earlier run had at the same point.
    """
    found = []
    for point, rounds in samples.items():
        for row in rows:
            if row.name not in rounds or row.engine.plugin is False:
                continue

            def judge(figure: str, target: float, row: Variant = row, at: Point = point) -> None:
                what = f"{row.name}, {at.text()}, {WORDS[figure]}"
                found.append(Verdict(what, ratio(samples[at], row.name, figure), target))

            decodes = all(r.decode_tokens for name in (row.name, PLAIN) for r in rounds[name])
            judge("total", SAME_WORK if row.does_plain_work else NEVER_BELOW)
            if decodes and row.does_plain_work:
                judge("decode", SAME_WORK)
            if decodes and row.compresses and crowded(point):
                judge("decode", PAYS)
            for figure in WORDS:
                before = (baseline or {}).get((point, row.name, figure))
                if before is not None and (decodes or figure == "total"):
                    now = ratio(rounds, row.name, figure)
                    times = Summary(now.median / before, now.low / before, now.high / before)
                    what = f"{row.name}, {point.text()}, {WORDS[figure]}, x over the baseline's x"
                    found.append(Verdict(what, times, AS_BEFORE))
    return found


def read_baseline(path: Path) -> Baseline:
    """The ratios of an earlier `bench throughput --json` report.

    Raises:
        typer.BadParameter: the file cannot be read, or is no such report.
    """
    try:
        text = read_text(path)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    try:
        report = json.loads(text)
        return {
            (Point(at["prompts"], at["prompt_tokens"]), name, figure): float(
                row["ratio_to_plain"][figure]["median"]
            )
            for at in report["points"]
            for name, row in at["rows"].items()
            for figure in WORDS
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise typer.BadParameter(f"{path} is no report of bench throughput") from None
