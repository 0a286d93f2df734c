"""Accuracy against throughput: a quality and a throughput report of the same model in one figure.

Both are asked for the same thing, a budget of 1/rate of the prompt under the default policy; what
whole pages then really hold depends on the prompt's length, and is given for each.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from vllm_kvcompress.bench.charts import COLOURS, PLAIN_COLOUR, panels, save
from vllm_kvcompress.bench.crossover import Point
from vllm_kvcompress.bench.harness import Summary
from vllm_kvcompress.bench.quality.rows import PLAIN
from vllm_kvcompress.bench.report.read import Found
from vllm_kvcompress.bench.table import Table
from vllm_kvcompress.bench.variants import compressing
from vllm_kvcompress.presets import DEFAULT_PRESET

SAME_BUDGET = 1e-3


class _Cell(BaseModel):
    """A row of the quality report's flat table: all text, empty where there is no number."""

    task: str
    length: str
    unseen: str
    policy: str
    budget: str
    held_share: str
    score: str

    @property
    def group(self) -> tuple[str, str]:
        return self.task, self.length


class _Row(BaseModel):
    asks: dict[str, Any] = {}
    ratio_to_plain: dict[str, Summary]


class _Load(BaseModel):
    prompts: int
    prompt_tokens: int
    rows: dict[str, _Row]


@dataclass(frozen=True)
class Step:
    """One rate: what is still answered, and how many tokens a second over plain vLLM.

    accuracy: mean over the tasks of the default policy's mean scores.
    quality_held, speed_held: shares of the prompt really held in either report.
    """

    rate: float
    accuracy: float
    quality_held: float
    speed_held: float
    ratio: Summary


@dataclass(frozen=True)
class Tradeoff:
    """A model's steps at every load of a throughput report."""

    model: str
    tasks: Sequence[str]
    full_accuracy: float
    steps: dict[Point, Sequence[Step]]
    quality_file: Path
    speed_file: Path

    def table(self) -> Table:
        rows = [
            [
                f"rate {step.rate:g}, {load.prompts} x {load.prompt_tokens:,}",
                f"{100 * step.accuracy:.1f}",
                f"{step.quality_held:.1%}",
                step.ratio.text(2),
                f"{step.speed_held:.1%}",
            ]
            for load, steps in self.steps.items()
            for step in steps
        ]
        return Table(
            f"{DEFAULT_PRESET} by rate, at so many prompts x tokens",
            ["rate, load", "score, %", "held", "x plain", "held, this load"],
            [["plain vLLM", f"{100 * self.full_accuracy:.1f}", "100.0%", "1.00", "100.0%"], *rows],
            f"Mean score over {', '.join(self.tasks)} ({self.quality_file}); tokens/s over plain "
            f"vLLM's, median and range ({self.speed_file}). Rows are matched by their budget, "
            "1/rate; the share really held depends on the prompt's length, so both are given.",
        )

    def draw(self, path: Path) -> None:
        """Accuracy over throughput, a line per load, rates written beside their points."""
        figure, (axes,) = panels(1)
        for colour, (load, steps) in zip(
            COLOURS * len(self.steps), self.steps.items(), strict=False
        ):
            x = [step.ratio.median for step in steps]
            y = [step.accuracy for step in steps]
            spread = [
                [step.ratio.median - step.ratio.low for step in steps],
                [step.ratio.high - step.ratio.median for step in steps],
            ]
            label = f"{load.prompts} x {load.prompt_tokens:,} tokens"
            axes.errorbar(
                x, y, xerr=spread, fmt="o-", color=colour, ms=4, elinewidth=1, label=label
            )
            for step in steps:
                axes.annotate(
                    f"{step.rate:g}",
                    (step.ratio.median, step.accuracy),
                    (3, 4),
                    textcoords="offset points",
                    color=colour,
                )
        axes.plot([1], [self.full_accuracy], "D", color=PLAIN_COLOUR, label="plain vLLM")
        axes.axvline(1, color=PLAIN_COLOUR, linewidth=1, linestyle=":")
        axes.set_ylim(-0.03, 1.08)
        axes.set_xlabel("tokens/s over plain vLLM's")
        axes.set_ylabel(f"mean score of {len(self.tasks)} tasks")
        axes.legend(frameon=False, loc="lower right")
        save(
            figure,
            path,
            f"{DEFAULT_PRESET} by rate (the numbers at the points); up and to the right is better.",
        )


def tradeoffs(found: Sequence[Found]) -> list[Tradeoff]:
    """One for every quality and throughput report of the same model that share a rate."""
    pairs = [
        (quality, speed)
        for quality in found
        for speed in found
        if quality.report.bench == "quality"
        and speed.report.bench == "throughput"
        and quality.report.parameters.get("model") == speed.report.parameters.get("model")
    ]
    return [out for quality, speed in pairs if (out := _tradeoff(quality, speed)) is not None]


def _tradeoff(quality: Found, speed: Found) -> Tradeoff | None:
    try:
        cells = TypeAdapter(list[_Cell]).validate_python(quality.report.extra("cells"))
        loads = TypeAdapter(list[_Load]).validate_python(speed.report.extra("points"))
        blocks = TypeAdapter(int).validate_python(speed.report.parameters.get("cache_blocks"))
    except ValidationError:
        return None
    seen = [cell for cell in cells if cell.unseen != "true" and cell.score]
    full = {cell.group: float(cell.score) for cell in seen if cell.policy == PLAIN}
    ours = [cell for cell in seen if cell.policy == DEFAULT_PRESET]
    steps = {
        Point(load.prompts, load.prompt_tokens): line
        for load in loads
        if (line := _line(load, ours, set(full), blocks))
    }
    if not full or not steps:
        return None
    return Tradeoff(
        model=str(quality.report.parameters["model"]),
        tasks=list(dict.fromkeys(task for task, _ in full)),
        full_accuracy=mean(full.values()),
        steps=steps,
        quality_file=quality.file,
        speed_file=speed.file,
    )


def _line(
    load: _Load, cells: Iterable[_Cell], groups: set[tuple[str, str]], blocks: int
) -> list[Step]:
    """A step per rate at which every task of the full cache has a score."""
    steps = []
    for row in load.rows.values():
        rate = row.asks.get("kv_compress_rate")
        if row.asks.get("kv_compress") != DEFAULT_PRESET or not rate:
            continue
        here = [c for c in cells if abs(float(c.budget) * rate - 1) < SAME_BUDGET]
        if {cell.group for cell in here} != groups:
            continue
        variant = compressing(DEFAULT_PRESET, rate)
        steps.append(
            Step(
                rate=rate,
                accuracy=mean(float(cell.score) for cell in here),
                quality_held=mean(float(cell.held_share) for cell in here),
                speed_held=variant.held_share(load.prompt_tokens, blocks),
                ratio=row.ratio_to_plain["total"],
            )
        )
    return sorted(steps, key=lambda step: step.rate)
