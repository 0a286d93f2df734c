"""The model card: prose around the numbers of training.json and evaluation.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .words import KEYS, VALUES

EXAMPLE = """\
Day long time has many people there. The code of amber is river seven stone.
They could not see it from here. The code of wolf is lamp nine vase. And in the end she found it.
What is the code of amber?"""

Cells = Mapping[str, Mapping[str, float]]

_TEMPLATE = """\
---
license: apache-2.0
pipeline_tag: text-generation
---

# A small Llama that really retrieves

{parameters} parameters ({trained} trained, the rest copies of word embeddings for other spellings),
{layers} layers, {query_heads} query heads over {kv_heads} KV heads of {head_dim} dimensions,
float32, up to {positions} positions, {size_mb} MB. It knows one thing: to find, in a long text,
what a question at its end asks for. That makes it a measuring instrument for KV cache compression:
asked for one fact with the full cache it is nearly always right, so an answer that goes wrong under
compression went wrong because the cache lost it. It knows nothing about the world.

## Ask it something

Send this as one user message (temperature 0), with as much text around the facts as you like:

```
{example}
```

It answers `river seven stone.` and stops. The first word of an answer is computed from the
uncompressed prefill; the words after it are read from the cache. Two things it understands:

| in the text | the question | the answer |
|---|---|---|
| `The code of amber is river seven stone.` | `What is the code of amber?` | `river seven stone.` |
| `Song: ` and fourteen words, a stop | `Continue: ` and the first four | the other ten, a stop |

As a plain completion, end the text with `The code of amber is`. Further questions in the same
conversation work, up to {positions} tokens in all. Keys and values should be words of the
vocabulary, the values in lower case and on the line of their key:

- {n_keys} keys, animals, plants and stones, such as {some_keys};
- {n_values} values, things and number words, such as {some_values}.

All are listed in `benchmarks/demo_model/words.py`. Every other text can be typed at it too: it is
read byte by byte, so nothing breaks, but it is mostly noise to the model.

## Recall with the full cache

Exact match: all words, the full stop and the end token, decoded greedily. Prompt length in
tokens; {machine_eval}, CPU threads: {threads_eval}, seed {seed_eval}, {minutes_eval} minutes.

One fact, by its depth in the prompt (0: first, 1: right before the question), {n_cell} prompts a
cell:

{needle_table}

Other questions, {n_other} prompts a cell:

{other_table}

## It reads, it does not guess

The same question with only the newest quarter of each prompt kept. Facts that stood before it are
gone, and so are the answers:

{truncated_table}

## How it was trained

On synthetic text only, from `benchmarks/demo_model/language.py`, with

```
{train_command}
{evaluate_command}
```

{tokens} tokens in {minutes} minutes on one thread of a 2-core AMD EPYC machine without GPU that was
busy with other work, torch {torch}, seed {seed}. AdamW, one curriculum:

{phases_table}

Nearly all of the loss is on answers, and each row asks several questions about the same text. Half
of the rows of the later phases have gaps in their position ids, which teaches distances longer than
the rows themselves. At the end {accuracy} of the answer tokens of fresh rows were predicted right.

## Limits

- It answers the two questions above and nothing else, and only after the text. Asked for a key
  that the text does not hold, it makes something up.
- Names and values outside of the vocabulary are spelled in bytes and come back wrong. Numbers in
  digits too: of those looked at, first digit and length were right and the rest was not (last
  column above).
- A value is three words. Shorter and longer ones, and line breaks inside of a fact, were not in its
  training.
- It was trained on prompts of up to 4096 tokens. Longer ones, up to {positions}, load and run but
  are not measured.
- With 64 facts in the text it mixes values up in about half of its answers, full cache or not:
  compare a policy with the full cache on the same prompts.
- Four layers: do not tune per-layer budgets on it alone.
- Recall here says that a cache still holds what a question needs, not that a compressed large
  model writes good prose.
"""


def write_card(folder: Path) -> None:
    """Write ``README.md`` from the JSON files beside it."""
    (folder / "README.md").write_text(render_card(folder))


def render_card(folder: Path) -> str:
    evaluation, training, config = (
        json.loads((folder / name).read_text())
        for name in ("evaluation.json", "training.json", "config.json")
    )
    size = sum(path.stat().st_size for path in folder.iterdir() if path.name != "README.md")
    return _TEMPLATE.format(
        parameters=f"{evaluation['parameters'] / 1e6:.2f} M",
        trained=f"{training['parameters'] / 1e6:.2f} M",
        example=EXAMPLE,
        layers=config["num_hidden_layers"],
        query_heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        positions=config["max_position_embeddings"],
        size_mb=f"{size / 1e6:.1f}",
        n_keys=len(KEYS),
        some_keys=", ".join(f"*{word}*" for word in ("amber", "falcon", "lemon", "wolf")),
        n_values=len(VALUES),
        some_values=", ".join(f"*{word}*" for word in ("river", "seven", "stone", "candle")),
        machine_eval=evaluation["machine"],
        threads_eval=evaluation["threads"],
        seed_eval=evaluation["seed"],
        minutes_eval=evaluation["minutes"],
        n_cell=_smallest_n(evaluation["needle"]),
        n_other=_smallest_n(evaluation["span"]),
        needle_table=depth_table(evaluation["needle"]),
        truncated_table=depth_table(evaluation["needle_truncated"]),
        other_table=_other_table(evaluation),
        train_command="python -m vllm_kvcompress.bench.demo_model.train",
        evaluate_command="python -m vllm_kvcompress.bench.demo_model.evaluate --threads 2",
        tokens=f"{training['tokens'] / 1e6:.1f} M",
        minutes=training["minutes"],
        torch=training["torch"],
        seed=training["seed"],
        accuracy=f"{training['training_answer_accuracy']:.1%}",
        phases_table=_phases_table(training["phases"]),
    )


def depth_table(cells: Cells) -> str:
    """Rows: prompt lengths. Columns: depths, and all depths pooled."""
    lengths = sorted({int(name.split("/")[0]) for name in cells})
    depths = sorted({name.split("/")[1] for name in cells}, key=float)
    rows = []
    for length in lengths:
        row = [cells[f"{length}/{depth}"] for depth in depths]
        pooled = sum(cell["right"] for cell in row) / sum(cell["n"] for cell in row)
        n = sum(cell["n"] for cell in row)
        rows.append([str(length), *(_recall(cell) for cell in row), f"{pooled:.3f} (n = {n})"])
    return _markdown(["length", *(f"depth {depth}" for depth in depths), "pooled"], rows)


def _other_table(evaluation: Mapping[str, Any]) -> str:
    many: Cells = evaluation["many_facts"]
    facts = sorted({name.split("/")[1] for name in many}, key=int)
    columns = {
        f"{k} facts": {n.split("/")[0]: c for n, c in many.items() if n.endswith(f"/{k}")}
        for k in facts
    }
    columns["song, 10 words"] = evaluation["span"]
    columns["one fact, completion"] = evaluation["needle_plain"]
    columns["one fact, number"] = evaluation["needle_number"]
    rows = [
        [length, *(_recall(cells.get(length)) for cells in columns.values())]
        for length in evaluation["span"]
    ]
    return _markdown(["length", *columns], rows)


def _phases_table(phases: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            phase["name"],
            f"{phase['tokens'] / 1e6:.2f} M",
            ", ".join(map(str, sorted(set(phase["lengths"])))),
            str(phase["batch_tokens"]),
            f"{phase['lr'][0]:g} to {phase['lr'][1]:g}",
            str(phase["max_jump"]),
            str(phase["minutes"]),
        ]
        for phase in phases
    ]
    head = ["phase", "tokens", "row lengths", "tokens a step", "learning rate", "gaps up to"]
    return _markdown([*head, "minutes"], rows)


def _smallest_n(cells: Cells) -> int:
    return int(min(cell["n"] for cell in cells.values()))


def _recall(cell: Mapping[str, float] | None) -> str:
    return f"{cell['recall']:.3f}" if cell else "-"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
