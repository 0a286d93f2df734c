"""Everything that only a GPU can say, in one command and under eight minutes.

    python -P benchmarks/gpu_check.py --json gpu.json        # a checkout, vLLM on the path
    python -P -m vllm_kvcompress.bench.gpu_check             # installed
    python -P benchmarks/gpu_check.py --rehearse             # no GPU: the same code, small shapes

Each section is a process of its own with a time limit, so one that fails or hangs stops no other.
Needs the standard library only; the sections are in `benchmarks/gpu/`. Where there is no GPU the
kernels are checked in Triton's interpreter on small shapes, and the rest says why it is skipped;
`--rehearse` runs all of it on a GPU that is pretended, and no figure of that means anything.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Seconds that each section may take; together they stay below eight minutes.
LIMITS_S = {
    "build": 60,
    "kernels": 50,
    "graphs": 20,
    "bandwidth": 25,
    "identity": 70,
    "throughput-plain": 60,
    "throughput-1": 50,
    "throughput-8": 55,
    "throughput-64": 35,
    "ttft": 45,
    "codec": 10,
}
REHEARSAL_LIMIT_S = 600
OFF_OF_PLAIN = 0.97
SECTION = "vllm_kvcompress.bench.gpu.section"
ENVIRONMENT = {
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_USE_DEEP_GEMM": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}
ENTRY_POINT = "[vllm.general_plugins]\nkv_compress = vllm_kvcompress.plugin:register\n"


def lay_out(checkout: Path, site: Path) -> None:
    """Make `site` what an install would be, by links: top-level folders go inside the package."""
    package = site / "vllm_kvcompress"
    package.mkdir(parents=True)
    inside = {path.name: path for path in (checkout / "vllm_kvcompress").iterdir()}
    inside |= {"kernels": checkout / "kernels", "configs": checkout / "configs"}
    for name, path in (inside | {"bench": checkout / "benchmarks"}).items():
        (package / name).symlink_to(path)
    info = site / "vllm_kvcompress-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-kvcompress\nVersion: 0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINT)


def is_installed() -> bool:
    return find_spec("vllm_kvcompress") is not None and find_spec(SECTION) is not None


def run_section(
    name: str, limit_s: float, environment: Mapping[str, str], command: Sequence[str] = ()
) -> dict[str, Any]:
    """One section's result: `state` is "ok", "failed", "skipped" or "timed out"."""
    command = command or [sys.executable, "-P", "-m", SECTION, name]
    began = time.monotonic()
    try:
        ran = subprocess.run(
            command,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"state": "timed out", "why": f"after {limit_s:g} s", "seconds": limit_s}
    seconds = round(time.monotonic() - began, 1)
    lines = ran.stdout.strip().splitlines()
    try:
        result = json.loads(lines[-1])
        if "state" not in result:
            raise ValueError("no state")
    except (IndexError, ValueError, TypeError):
        last = (ran.stderr.strip() or "it said nothing").splitlines()[-1]
        result = {"state": "failed", "why": last[-300:], "stderr": ran.stderr[-4000:]}
    return result | {"seconds": seconds}


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One line per figure: section, what was found, the floor or bound it is held against."""
    lines = [f"{'section':<18}{'state':<11}{'s':>6}  found"]
    for name, result in results.items():
        head = f"{name:<18}{result['state']:<11}{result['seconds']:>6.1f}  "
        found = [result["why"]] if "why" in result else []
        found += [
            f"{row['what']}: {row['found']}"
            + (f"  (bound {row['bound']})" if "bound" in row else "")
            + ("" if "met" not in row else ": met" if row["met"] else ": MISSED")
            for row in result.get("rows", ())
        ]
        lines.append(head + (found[0] if found else ""))
        lines += [" " * len(head) + line for line in found[1:]]
    return "\n".join(lines)


def beside_plain(results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows that need two sections: every rate beside plain vLLM."""
    plain = results.get("throughput-plain", {})
    if "tokens_s" not in plain:
        return []
    rows: list[dict[str, Any]] = [
        {
            "what": f"{name.removeprefix('throughput-')} beside plain vLLM, tokens per second",
            "found": f"{result['tokens_s'] / plain['tokens_s']:.2f}",
        }
        for name, result in results.items()
        if "tokens_s" in result and result is not plain
    ]
    if off := results.get("throughput-8", {}).get("few_tokens_s"):
        share = off / plain["few_tokens_s"]
        what = "all requests `off` beside plain vLLM, tokens per second"
        met = share >= OFF_OF_PLAIN
        rows.append(
            {"what": what, "found": f"{share:.2f}", "bound": f">= {OFF_OF_PLAIN}", "met": met}
        )
    return rows


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the sections; 1 where one has failed or timed out."""
    parser = argparse.ArgumentParser(prog, description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the whole report there")
    parser.add_argument("--rehearse", action="store_true", help="on a GPU that is only pretended")
    parser.add_argument("--only", nargs="+", choices=LIMITS_S, default=list(LIMITS_S))
    options = parser.parse_args(arguments)
    environment = dict(ENVIRONMENT)
    limits = dict(LIMITS_S)
    if options.rehearse:
        print("A rehearsal without a GPU: no figure below means anything.", flush=True)
        environment |= {"KV_COMPRESS_REHEARSAL": "1", "VLLM_USE_V2_MODEL_RUNNER": "0"}
        limits = dict.fromkeys(limits, REHEARSAL_LIMIT_S)
    results: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        if not is_installed():
            site = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "site"
            lay_out(Path(__file__).resolve().parent.parent, site)
            paths = [str(site), os.environ.get("PYTHONPATH", "")]
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        for name in options.only:
            results[name] = run_section(name, limits[name], environment)
            print(table({name: results[name]}).split("\n", 1)[1], flush=True)
    if rows := beside_plain(results):
        results["beside plain"] = {"state": "ok", "seconds": 0.0, "rows": rows}
        print(table({"beside plain": results["beside plain"]}).split("\n", 1)[1], flush=True)
    if options.json:
        report = {"rehearsal": options.rehearse, "sections": results}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return int(any(result["state"] in ("failed", "timed out") for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
