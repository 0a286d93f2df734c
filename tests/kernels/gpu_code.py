"""Compile every Triton kernel for GPUs that are not here, and print what ptxas says of it.

    .venv/bin/python -P tests/kernels/gpu_code.py > kernels.json

Needs no GPU, and a process in which Triton's interpreter is off. The launches are those that the
public functions make, on empty tensors in the shape of an 8B model (D 128, 4 query heads per KV
head, bf16, pages of 16).
"""

import json
import re
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from vllm_kvcompress.kernels import (
    Arenas,
    WindowScore,
    attend_pages,
    attention,
    compact,
    compaction,
    fill_tables,
    head_slots,
    score_window,
    scoring,
    slots,
    split_pages,
    tables,
)

ARCHITECTURES = (80, 90, 100)
POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32"}
POINTERS[torch.int64] = "*i64"
ALIGNED = [["tt.divisibility", 16]]


class Recorder:
    """Stands for a kernel and remembers its launches."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.launches: list[dict[str, Any]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **named: self.launches.append(
            dict(zip(self.kernel.arg_names, args, strict=False)) | named
        )


def record() -> list[Recorder]:
    """Launch everything once; the kernels only take note."""
    recorders = []
    for module in (attention, compaction, scoring, slots, tables):
        for name, kernel in vars(module).items():
            if isinstance(kernel, triton.JITFunction) and "program_id" in kernel.src:
                recorders.append(Recorder(kernel))
                setattr(module, name, recorders[-1])
    layers, heads, group, size, page_tokens = 2, 2, 4, 128, 16
    pool = torch.zeros(64, 1, page_tokens, 2 * size, dtype=torch.bfloat16)
    keys, values = split_pages(pool)
    queries = torch.zeros(4, heads, group, size, dtype=torch.bfloat16)
    table, lengths = torch.zeros(8, 16, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
    flat = queries.flatten(0, 1)
    for splits in (4, 1):
        attend_pages(flat, keys, values, table, lengths, 0.1, torch.empty_like(flat), splits)
    candidates = torch.zeros(layers, heads, 16, dtype=torch.int64)
    kept = torch.zeros(layers * heads * page_tokens, dtype=torch.int64)
    compact(keys, values, candidates, 256, kept, torch.zeros(1, dtype=torch.int64))
    positions = torch.arange(256)
    asked = torch.arange(4)
    args = (queries, asked, keys, candidates[0], lengths[:heads], positions, 0.1)
    score_window(*args, WindowScore())
    arenas = Arenas.allocate(8, layers, heads, 16, "cpu")
    out = torch.zeros(layers, 8, heads, 16, dtype=torch.int32)
    fill_tables(arenas, lengths, table, lengths, page_tokens, 0, out, out[..., 0].contiguous())
    slot_out = torch.zeros(8, heads, dtype=torch.int64)
    head_slots(table, lengths, positions[:8], 0, layers, heads, page_tokens, slot_out)
    return recorders


def source(kernel: Any, launch: dict[str, Any]) -> ASTSource:
    """The kernel specialised as Triton would for this launch."""
    signature, constants, hints = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, launch[parameter.name]
        worth_it = not parameter.do_not_specialize
        if parameter.is_constexpr or (worth_it and isinstance(value, int) and value == 1):
            signature[name], constants[(index,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], hints[(index,)] = POINTERS[value.dtype], ALIGNED
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if worth_it and value % 16 == 0:
                hints[(index,)] = ALIGNED
    return ASTSource(kernel, signature, constants, hints)


def assemble(ptx: str, architecture: int) -> dict[str, int]:
    """Registers per thread and spilled bytes, from `ptxas -v`."""
    (target,) = re.findall(r"^\.target\s+(\w+)", ptx, re.MULTILINE)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(architecture).path, "-v", f"--gpu-name={target}", file.name]
        command += ["-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = re.findall(r"(\d+) bytes spill", said)
    return {
        "registers": int(re.findall(r"Used (\d+) registers", said)[0]),
        "spilled_bytes": sum(map(int, spilled)),
    }


def main() -> None:
    warnings.simplefilter("ignore")
    figures = {}
    for recorder in record():
        every_launch = product(enumerate(recorder.launches, start=1), ARCHITECTURES)
        for (number, launch), architecture in every_launch:
            options = {key: launch[key] for key in ("num_warps", "num_stages") if key in launch}
            made = triton.compile(
                source(recorder.kernel, launch),
                target=GPUTarget("cuda", architecture, 32),
                options=options,
            )
            name = f"{Path(recorder.kernel.fn.__code__.co_filename).stem}.{made.name}"
            name += f" {number}" if len(recorder.launches) > 1 else ""
            figures[f"{name} sm_{architecture}"] = {
                **assemble(made.asm["ptx"], architecture),
                "shared_bytes": made.metadata.shared,
            }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
