"""`python -m vllm_kvcompress.bench.gpu.section NAME`: run one section, print one line of JSON."""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

from vllm_kvcompress.bench.gpu.skipped import Skipped


def sections() -> dict[str, Callable[[], dict[str, Any]]]:
    """What each section runs, by name; a result has `rows` of what, found and bound."""
    from vllm_kvcompress.bench.gpu import engines, kernels, speed, ttft

    throughput = {f"throughput-{rate}": rate for rate in ("plain", 1, 8, 64)}
    return {
        "kernels": kernels.against_float64,
        "graphs": kernels.replayed,
        "bandwidth": speed.decode_bandwidth,
        "identity": engines.identity,
        **{name: lambda rate=rate: engines.throughput(rate) for name, rate in throughput.items()},
        "ttft": ttft.ttft,
        "codec": speed.codec,
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
    if sys.argv[1] == "kernels":
        import torch

        if not torch.cuda.is_available():
            os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    result = run(sys.argv[1])
    print(json.dumps(result))
