"""Measure the demo model's recall with the full cache and write its numbers and its model card."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Annotated, Any

import torch
import typer
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.demo_model.card import write_card
from benchmarks.demo_model.language import Task, many_facts_task, needle_task, span_task

LENGTHS = (256, 512, 1024, 2048, 4096)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
FACTS = (4, 16, 64)
TRUNCATED_SHARE = 0.25


@dataclass(frozen=True)
class Encoded:
    """A task as token ids: the prompt with its special tokens, and the answer up to its end."""

    prompt: list[int]
    answer: list[int]

    def truncated(self, share: float) -> Encoded:
        """Only the first token (the begin mark) and the newest ``share`` of the prompt."""
        kept = max(1, round(len(self.prompt) * share))
        return Encoded(self.prompt[:1] + self.prompt[-kept:], self.answer)


class Reader:
    """The shipped model, asked with the full cache."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()

    def encode(self, task: Task) -> Encoded:
        answer = self.tokenizer.encode(" " + task.answer, add_special_tokens=False)
        answer.append(self.tokenizer.eos_token_id)
        if task.form == "plain":
            return Encoded(self.tokenizer.encode(task.prompt), answer)
        turn = [{"role": "user", "content": task.prompt}]
        prompt = self.tokenizer.apply_chat_template(
            turn, add_generation_prompt=True, return_dict=False
        )
        return Encoded(prompt, answer)

    @torch.inference_mode()
    def is_exact(self, rows: Iterable[Encoded]) -> list[bool]:
        """Whether greedy decoding writes exactly the answer and stops.

        One forward pass over prompt and answer decides it: greedy decoding follows the answer as
        long as each of its tokens is the likeliest after the ones before.
        """
        rows = list(rows)
        size = max(len(row.prompt) + len(row.answer) for row in rows)
        full = [row.prompt + row.answer for row in rows]
        ids = torch.tensor([ids + [0] * (size - len(ids)) for ids in full])
        kept = size - min(len(row.prompt) for row in rows) + 1
        logits = self.model(ids, logits_to_keep=kept).logits  # [B, kept, V]
        best = logits.argmax(-1)
        right = []
        for i, row in enumerate(rows):
            start = len(row.prompt) - 1 - (size - kept)
            right.append(best[i, start : start + len(row.answer)].tolist() == row.answer)
        return right


@dataclass
class Cell:
    """Exact matches among ``n`` tasks of one kind."""

    n: int = 0
    right: int = 0

    def add(self, results: Iterable[bool]) -> None:
        for result in results:
            self.n += 1
            self.right += result

    def as_json(self) -> dict[str, float]:
        return {"n": self.n, "right": self.right, "recall": round(self.right / self.n, 4)}


def measure(
    reader: Reader, make: Callable[[], Task], n: int, share: float | None = None
) -> dict[str, float]:
    """Recall over ``n`` fresh tasks, of the whole prompt or of its newest ``share``."""
    cell = Cell()
    for batch in _batches(reader, make, n):
        cell.add(reader.is_exact(batch if share is None else [r.truncated(share) for r in batch]))
    return cell.as_json()


def _batches(reader: Reader, make: Callable[[], Task], n: int) -> Iterator[list[Encoded]]:
    rows: list[Encoded] = []
    for _ in range(n):
        rows.append(reader.encode(make()))
        if sum(len(row.prompt) for row in rows) >= 8192:
            yield rows
            rows = []
    if rows:
        yield rows


def plan(rng: Random) -> dict[str, dict[str, tuple[Callable[[], Task], float | None]]]:
    """Table -> cell -> how to draw a task, and which share of the prompt is kept (None: all)."""
    tables: dict[str, dict[str, tuple[Callable[[], Task], float | None]]] = {}

    def cell(table: str, name: str, make: Callable[[], Task], share: float | None = None) -> None:
        tables.setdefault(table, {})[name] = (make, share)

    for n in LENGTHS:
        for d in DEPTHS:
            cell("needle", f"{n}/{d}", lambda n=n, d=d: needle_task(rng, n, d))
            cell(
                "needle_truncated",
                f"{n}/{d}",
                lambda n=n, d=d: needle_task(rng, n, d),
                TRUNCATED_SHARE,
            )
        for facts in FACTS:
            if facts * 14 <= n:
                cell("many_facts", f"{n}/{facts}", lambda n=n, k=facts: many_facts_task(rng, n, k))
        cell("span", f"{n}", lambda n=n: span_task(rng, n, rng.random()))
        cell(
            "needle_plain", f"{n}", lambda n=n: needle_task(rng, n, rng.random(), form="plain")
        )
        cell(
            "needle_number", f"{n}", lambda n=n: needle_task(rng, n, rng.random(), value="number")
        )
    return tables


def evaluate(
    model: Annotated[Path, typer.Option(help="Folder of the model; card and numbers go there.")] = (
        Path("vllm_kvcompress/demo_model")
    ),
    n: Annotated[int, typer.Option(help="Prompts a cell of length x depth.")] = 40,
    n_pooled: Annotated[int, typer.Option(help="Prompts a cell of the other tables.")] = 100,
    seed: Annotated[int, typer.Option(help="Decides every prompt.")] = 2026,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    max_length: Annotated[int, typer.Option(help="Leave out longer prompts.")] = LENGTHS[-1],
    card: Annotated[bool, typer.Option(help="Write evaluation.json and README.md.")] = True,
) -> None:
    """Ask the demo model with its full cache: facts over length and depth, many facts, songs.

    An answer counts when greedy decoding writes all its words, the full stop and the end token.
    The truncated table keeps only the newest quarter of each prompt and shows that the model
    reads its context: what stood before that quarter is lost.
    """
    torch.set_num_threads(threads)
    reader = Reader(model)
    started = time.monotonic()
    results: dict[str, Any] = {}
    tables = plan(Random(seed))
    bar = tqdm(total=sum(map(len, tables.values())), unit="cell", mininterval=5)
    for table, cells in tables.items():
        results[table] = {}
        for name, (make, share) in cells.items():
            bar.update()
            if int(name.split("/")[0]) > max_length:
                continue
            size = n if table.startswith("needle") and "/" in name else n_pooled
            results[table][name] = measure(reader, make, size, share)
        pooled = [c["right"] for c in results[table].values()]
        bar.write(f"{table}: {sum(pooled)} of {sum(c['n'] for c in results[table].values())} right")
    bar.close()
    report = {
        "seed": seed,
        "threads": threads,
        "minutes": round((time.monotonic() - started) / 60, 1),
        "machine": f"{platform.machine()}, CPU",
        "truncated_share": TRUNCATED_SHARE,
        **results,
    }
    if not card:
        print(json.dumps(report, indent=1))
        return
    (model / "evaluation.json").write_text(json.dumps(report, indent=1) + "\n")
    write_card(model)


if __name__ == "__main__":
    typer.run(evaluate)
