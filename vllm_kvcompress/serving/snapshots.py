"""The latest figures of every engine, for `GET /v1/kv_compress/stats`.

With several API processes each snapshot reaches only one of them, so they share files in the
directory that vLLM makes for Prometheus in that case. Every process writes its own file.
"""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from vllm_kvcompress.engine.stats import add_names

SHARED_DIR = "PROMETHEUS_MULTIPROC_DIR"
SUMMED = ("recompressions", "blocks_freed", "pages_freed")


class Snapshots:
    def __init__(self) -> None:
        self._latest: dict[int, dict[str, Any]] = {}

    def put(self, engine: int, payload: dict[str, Any]) -> None:
        """Remember the newest snapshot of an engine."""
        kept = {k: v for k, v in payload.items() if k not in ("before", "seconds")}
        self._latest[engine] = kept
        if shared := os.environ.get(SHARED_DIR):
            path = Path(shared) / f"kv_compress_{engine}_{os.getpid()}.json"
            path.with_suffix(".tmp").write_text(json.dumps(kept))
            path.with_suffix(".tmp").replace(path)

    def latest(self) -> dict[int, dict[str, Any]]:
        """The newest snapshot of every engine, whichever process it reached."""
        latest = dict(self._latest)
        if shared := os.environ.get(SHARED_DIR):
            for path in Path(shared).glob("kv_compress_*_*.json"):
                engine, snapshot = int(path.stem.split("_")[2]), json.loads(path.read_text())
                if snapshot["number"] > latest.get(engine, {"number": 0})["number"]:
                    latest[engine] = snapshot
        return latest

    def summed(self) -> dict[str, Any]:
        """The figures of all engines together: see docs/verification.md for the fields."""
        latest = self.latest()
        requests: dict[str, Counter[str]] = {}
        tokens: dict[str, Counter[str]] = {"prompt_tokens": Counter(), "held_tokens": Counter()}
        kernels: dict[str, list[str]] = {}
        recent = []
        for engine, snapshot in sorted(latest.items()):
            for policy, outcome, count in snapshot["requests"]:
                requests.setdefault(policy, Counter())[outcome] += count
            for name, counter in tokens.items():
                counter.update(snapshot[name])
            add_names(kernels, snapshot["kernels"])
            recent += [{**record, "engine": engine} for record in snapshot["recent"]]
        return {
            "requests": requests,
            **tokens,
            **{name: sum(snapshot[name] for snapshot in latest.values()) for name in SUMMED},
            "kernels": kernels,
            "recent": recent,
        }
