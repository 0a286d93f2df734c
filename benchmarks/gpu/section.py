"""`python -m vllm_kvcompress.bench.gpu.section NAME`: run one section, print one line of JSON.

With KV_COMPRESS_REHEARSAL=1 on a GPU that is only pretended.
"""

import json
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from importlib import import_module
from typing import Any

RATES = ("plain", 1, 8, 64)
WITHOUT_VLLM = ("build", "kernels", "graphs", "codec")


def _call(module: str, function: str, *args: Any) -> dict[str, Any]:
    return getattr(import_module(f"vllm_kvcompress.bench.gpu.{module}"), function)(*args)


# What each section runs, by name; a result has `rows` of what, found, bound and met.
SECTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "build": partial(_call, "kernels", "built"),
    "kernels": partial(_call, "kernels", "against_float64"),
    "graphs": partial(_call, "kernels", "replayed"),
    "bandwidth": partial(_call, "speed", "decode_bandwidth"),
    "identity": partial(_call, "engines", "identity"),
    **{f"throughput-{r}": partial(_call, "throughput", "throughput", r) for r in RATES},
    "ttft": partial(_call, "ttft", "ttft"),
    "codec": partial(_call, "codec", "codec"),
}


def run(name: str) -> dict[str, Any]:
    from vllm_kvcompress.bench.gpu.skipped import Skipped

    try:
        return {"state": "ok", **SECTIONS[name]()}
    except Skipped as reason:
        return {"state": "skipped", "why": str(reason)}
    except Exception as error:
        import traceback

        why = f"{type(error).__name__}: {error}"[:300]
        return {"state": "failed", "why": why, "stderr": traceback.format_exc()[-4000:]}


def main(name: str) -> None:
    if os.environ.get("KV_COMPRESS_REHEARSAL") == "1":
        from vllm_kvcompress.bench.gpu.pretend import pretend

        pretend(engine=name not in WITHOUT_VLLM)
    elif name == "kernels":
        import torch

        if not torch.cuda.is_available():
            os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    with redirect_stdout(sys.stderr):
        result = run(name)
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])
