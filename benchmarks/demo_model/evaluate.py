"""Measure the demo model's recall with the full cache and write its numbers and its model card."""

from __future__ import annotations

import json
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Annotated, Any, NamedTuple

import torch
import typer
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from .card import write_card
from .language import Task, many_facts_task, needle_task, span_task

LENGTHS = (256, 512, 1024, 2048, 4096)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
FACTS = (4, 16, 64)
TRUNCATED_SHARE = 0.25
NUMBER_LENGTHS_UP_TO = 1024


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


def measure(
    reader: Reader, make: Callable[[], Task], n: int, share: float | None = None
) -> dict[str, float]:
    """Recall over ``n`` fresh tasks, of the whole prompt or of its newest ``share``."""
    right = 0
    for batch in _batches(reader, make, n):
        right += sum(
            reader.is_exact(batch if share is None else [row.truncated(share) for row in batch])
        )
    return {"n": n, "right": right, "recall": round(right / n, 4)}


def _batches(reader: Reader, make: Callable[[], Task], n: int) -> Iterator[list[Encoded]]:
    rows: list[Encoded] = []
    for _ in range(n):
        rows.append(reader.encode(make()))
        if sum(len(row.prompt) for row in rows) >= 8192:
            yield rows
            rows = []
    if rows:
        yield rows


class Question(NamedTuple):
    """How to draw the tasks of a cell, and the newest share of the prompt kept (None: all)."""

    make: Callable[[], Task]
    share: float | None = None


def plan(rng: Random) -> dict[str, dict[str, Question]]:
    """Table -> cell, named ``length`` or ``length/depth`` or ``length/facts`` -> question."""
    tables: dict[str, dict[str, Question]] = defaultdict(dict)
    for n in LENGTHS:
        for depth in DEPTHS:
            needle = partial(needle_task, rng, n, depth)
            tables["needle"][f"{n}/{depth}"] = Question(needle)
            tables["needle_truncated"][f"{n}/{depth}"] = Question(needle, TRUNCATED_SHARE)
        for facts in FACTS:
            if facts * 14 <= n:
                tables["many_facts"][f"{n}/{facts}"] = Question(
                    partial(many_facts_task, rng, n, facts)
                )
        tables["span"][f"{n}"] = Question(_anywhere(rng, span_task, n))
        tables["needle_plain"][f"{n}"] = Question(_anywhere(rng, needle_task, n, form="plain"))
        if n <= NUMBER_LENGTHS_UP_TO:
            tables["needle_number"][f"{n}"] = Question(
                _anywhere(rng, needle_task, n, value="number")
            )
    return tables


def _anywhere(
    rng: Random, make: Callable[..., Task], n_tokens: int, **options: Any
) -> Callable[[], Task]:
    return lambda: make(rng, n_tokens, rng.random(), **options)


def cpu_name() -> str:
    """The processor as Linux names it, else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def evaluate(
    model: Annotated[Path, typer.Option(help="Folder of the model; card and numbers go there.")] = (
        Path("vllm_kvcompress/demo_model")
    ),
    n: Annotated[int, typer.Option(help="Prompts a cell of length x depth.")] = 40,
    n_pooled: Annotated[int, typer.Option(help="Prompts a cell of the other tables.")] = 40,
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
        for name, question in cells.items():
            bar.update()
            if int(name.split("/")[0]) > max_length:
                continue
            size = n if table.startswith("needle") and "/" in name else n_pooled
            results[table][name] = measure(reader, question.make, size, question.share)
        pooled = [c["right"] for c in results[table].values()]
        bar.write(f"{table}: {sum(pooled)} of {sum(c['n'] for c in results[table].values())} right")
    bar.close()
    report = {
        "seed": seed,
        "threads": threads,
        "minutes": round((time.monotonic() - started) / 60, 1),
        "machine": cpu_name(),
        "parameters": sum(p.numel() for p in reader.model.parameters()),
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
