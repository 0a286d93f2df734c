"""The demo model's language as tasks for lm-eval; docs/lm-eval.md says how to run them.

python -m vllm_kvcompress.bench.lm_eval_tasks results/lm-eval
"""

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Annotated, Any

import typer
import yaml

from vllm_kvcompress.bench.demo_model.language import (
    Task,
    many_facts_task,
    needle_task,
    span_task,
)

TAG = "kv_compress_demo"
FACTS = 16
STOP = "."
MAX_NEW_TOKENS = 24
MAKERS: dict[str, Callable[[Random, int], Task]] = {
    "demo_needle": lambda rng, tokens: needle_task(rng, tokens, rng.random(), form="plain"),
    "demo_many_facts": lambda rng, tokens: many_facts_task(rng, tokens, FACTS, form="plain"),
    "demo_span": lambda rng, tokens: span_task(rng, tokens, rng.random(), form="plain"),
}

app = typer.Typer(add_completion=False)


@app.command()
def main(
    folder: Annotated[Path, typer.Argument(help="Where a YAML and a JSONL file per task go.")],
    n: Annotated[int, typer.Option(min=1, max=100_000, help="Prompts of each task.")] = 100,
    tokens: Annotated[int, typer.Option(min=256, max=4000, help="Of each prompt.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
) -> None:
    """Write tasks that only the demo model can do, for `lm-eval --include_path`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in MAKERS:
            write_task(folder, name, n, tokens, seed)
    except OSError as error:
        typer.echo(f"cannot write {error.filename}: {error.strerror}", err=True)
        raise typer.Exit(2) from None
    typer.echo(f"{folder}: {', '.join(MAKERS)}, together {TAG}")


def write_task(folder: Path, name: str, n: int, tokens: int, seed: int) -> None:
    """The prompts of a task and its description, which names them by their full path."""
    rng = Random(f"{seed} {name} {tokens}")
    made = [MAKERS[name](rng, tokens) for _ in range(n)]
    data = (folder / f"{name}.jsonl").resolve()
    lines = [{"prompt": one.prompt, "answer": one.answer.removesuffix(STOP)} for one in made]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    description = yaml.safe_dump(description_of(name, data), sort_keys=False)
    (folder / f"{name}.yaml").write_text(description)


def description_of(name: str, data: Path) -> dict[str, Any]:
    return {
        "task": name,
        "tag": TAG,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "num_fewshot": 0,
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {
            "until": [STOP],
            "max_gen_toks": MAX_NEW_TOKENS,
            "temperature": 0,
            "do_sample": False,
        },
        "filter_list": [
            {
                "name": "words",
                "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}],
            }
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1},
    }


if __name__ == "__main__":
    app()
