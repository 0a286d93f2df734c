"""Where compression begins to pay: the smallest load from which it stays ahead of plain vLLM."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from vllm_kvcompress.bench.charts import COLOURS, line_with_range, log_sizes, panels, save
from vllm_kvcompress.bench.harness import Summary
from vllm_kvcompress.bench.table import Table

NEVER = "-"


class Point(NamedTuple):
    """A workload of the grid: requests at once, and the tokens of each one's prompt."""

    prompts: int
    prompt_tokens: int

    def text(self) -> str:
        many = "prompt" if self.prompts == 1 else "prompts"
        return f"{self.prompts} {many} of {self.prompt_tokens:,} tokens"


Ratios = Mapping[Point, Summary]


def pays_from(ratios: Mapping[int, Summary]) -> int | None:
    """The smallest size from which on even the worst round beats plain vLLM; None for none.

    Args:
        ratios: size of the load -> throughput over plain vLLM's.
    """
    answer = None
    for size in sorted(ratios, reverse=True):
        if not ratios[size].low > 1:
            break
        answer = size
    return answer


def crossovers(ratios: Ratios) -> tuple[dict[int, int | None], dict[int, int | None]]:
    """(prompt tokens -> fewest prompts that pay, prompts -> fewest prompt tokens that pay)."""
    by_tokens = {
        tokens: pays_from({p.prompts: r for p, r in ratios.items() if p.prompt_tokens == tokens})
        for tokens in sorted({point.prompt_tokens for point in ratios})
    }
    by_prompts = {
        prompts: pays_from({p.prompt_tokens: r for p, r in ratios.items() if p.prompts == prompts})
        for prompts in sorted({point.prompts for point in ratios})
    }
    return by_tokens, by_prompts


def tables(rows: Mapping[str, Ratios]) -> list[Table]:
    """One table per direction that the grid has at least two sizes of."""
    found = {name: crossovers(ratios) for name, ratios in rows.items() if ratios}
    if not found:
        return []
    by_tokens = sorted({tokens for pays, _ in found.values() for tokens in pays})
    by_prompts = sorted({prompts for _, pays in found.values() for prompts in pays})
    out = []
    if len(by_prompts) > 1:
        cells = [
            [f"{tokens:,}", *(_cell(pays[0].get(tokens)) for pays in found.values())]
            for tokens in by_tokens
        ]
        out.append(
            Table(
                "Fewest requests at once from which compression pays",
                ["prompt tokens", *found],
                cells,
                f"From there on every round has more tokens/s than plain vLLM; {NEVER}: not in "
                f"this grid, up to {max(by_prompts)} requests.",
            )
        )
    if len(by_tokens) > 1:
        cells = [
            [f"{prompts}", *(_cell(pays[1].get(prompts)) for pays in found.values())]
            for prompts in by_prompts
        ]
        out.append(
            Table(
                "Shortest prompt from which compression pays",
                ["requests at once", *found],
                cells,
                f"In tokens. {NEVER}: not in this grid, up to {max(by_tokens):,} tokens.",
            )
        )
    return out


def _cell(size: int | None) -> str:
    return NEVER if size is None else f"{size:,}"


def plot(rows: Mapping[str, Ratios], path: Path, caption: str) -> None:
    """Throughput over plain vLLM's against the load, a panel per row, a line per prompt length.

    With one number of requests only, against the prompt length.
    """
    rows = {name: ratios for name, ratios in rows.items() if ratios}
    over_prompts = len({point.prompts for ratios in rows.values() for point in ratios}) > 1
    figure, axes = panels(len(rows), share_y=True)
    for axis, (name, ratios) in zip(axes, rows.items(), strict=True):
        lines = _lines(ratios, over_prompts)
        for colour, (label, line) in zip(COLOURS * len(lines), lines.items(), strict=False):
            sizes, sums = zip(*line, strict=True)
            line_with_range(axis, sizes, sums, colour, label)
        axis.axhline(1, color="#555555", linewidth=1, linestyle="--")
        log_sizes(
            axis,
            (point.prompts if over_prompts else point.prompt_tokens for point in ratios),
            "requests at once" if over_prompts else "prompt tokens",
        )
        axis.set_title(name)
        axis.set_ylabel("tokens/s over plain vLLM's")
    axes[0].legend(frameon=False, title="prompt tokens" if over_prompts else None)
    save(figure, path, caption)


def _lines(ratios: Ratios, over_prompts: bool) -> dict[str, Sequence[tuple[int, Summary]]]:
    lines: dict[str, list[tuple[int, Summary]]] = {}
    for point, ratio in sorted(ratios.items()):
        label = f"{point.prompt_tokens:,}" if over_prompts else point.text().split(" of ")[0]
        size = point.prompts if over_prompts else point.prompt_tokens
        lines.setdefault(label, []).append((size, ratio))
    return lines
