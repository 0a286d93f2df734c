"""`python -m vllm_kvcompress.bench.gpu.section NAME`: one section, in a process of its own.

It imports what it needs, waits for a line of JSON on stdin (figures of earlier sections, by name),
and then says line by line in JSON what it found: `{"row": {...}}`, and at its end `{"state": ...}`,
which is `ok`, `skipped` or `failed`. With KV_COMPRESS_REHEARSAL=1 on a GPU that is only pretended.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any

Figures = Mapping[str, float]
# Each is a function in a module beside this one.
SECTIONS = {
    "machine": ("machine", "machine"),
    "kernels": ("kernels", "against_float64"),
    "graphs": ("kernels", "replayed"),
    "identity": ("engines", "identity"),
    "bandwidth": ("speed", "decode_bandwidth"),
    "codec": ("codec", "codec"),
    "plain": ("throughput", "plain"),
    "compressed": ("throughput", "compressed"),
    "flashinfer": ("speed", "flashinfer_bandwidth"),
}
WITHOUT_VLLM = ("machine", "kernels", "graphs", "codec")


def messages(run: Callable[[Figures], Iterator[Any]], figures: Figures) -> Iterator[dict[str, Any]]:
    """What a section says, its end included whatever happens."""
    from vllm_kvcompress.bench.gpu.skipped import Skipped

    try:
        for row in run(figures):
            yield {"row": row.as_json()}
    except Skipped as reason:
        yield {"state": "skipped", "why": str(reason)}
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        yield {"state": "failed", "why": why, "stderr": traceback.format_exc()[-4000:]}
    else:
        yield {"state": "ok"}


def main(name: str) -> None:
    report = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print
    if os.environ.get("KV_COMPRESS_REHEARSAL") == "1":
        from vllm_kvcompress.bench.gpu.pretend import pretend

        pretend(engine=name not in WITHOUT_VLLM)
    if name not in WITHOUT_VLLM:
        import_module("vllm.entrypoints.llm")
    module, function = SECTIONS[name]
    run = getattr(import_module(f"vllm_kvcompress.bench.gpu.{module}"), function)
    if line := sys.stdin.readline():
        for message in messages(run, json.loads(line)):
            print(json.dumps(message), file=report, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
