"""`python -m vllm_kvcompress.bench.gpu.section NAME`: run one section, print one line of JSON.

With KV_COMPRESS_REHEARSAL=1 on a GPU that is only pretended.
"""

import json
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

from vllm_kvcompress.bench.gpu.skipped import Skipped


def sections() -> dict[str, Callable[[], dict[str, Any]]]:
    """What each section runs, by name; a result has `rows` of what, found and bound."""
    from vllm_kvcompress.bench.gpu import codec, engines, kernels, speed, throughput

    rates = {f"throughput-{rate}": rate for rate in ("plain", 1, 8, 64)}
    return {
        "build": kernels.built,
        "kernels": kernels.against_float64,
        "graphs": kernels.replayed,
        "bandwidth": speed.decode_bandwidth,
        "identity": engines.identity,
        **{name: lambda rate=rate: throughput.throughput(rate) for name, rate in rates.items()},
        "ttft": engines.ttft,
        "codec": codec.codec,
    }


def run(name: str) -> dict[str, Any]:
    try:
        return {"state": "ok", **sections()[name]()}
    except Skipped as reason:
        return {"state": "skipped", "why": str(reason)}
    except Exception as error:
        import traceback

        why = f"{type(error).__name__}: {error}"[:300]
        return {"state": "failed", "why": why, "stderr": traceback.format_exc()[-4000:]}


if __name__ == "__main__":
    asked = sys.argv[1]
    if os.environ.get("KV_COMPRESS_REHEARSAL") == "1":
        from vllm_kvcompress.bench.gpu.pretend import pretend

        pretend()
    elif asked == "kernels":
        import torch

        if not torch.cuda.is_available():
            os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    with redirect_stdout(sys.stderr):
        result = run(asked)
    print(json.dumps(result))
