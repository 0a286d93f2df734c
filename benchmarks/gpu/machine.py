"""What the GPU host has: rows that every report begins with."""

import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version

import torch

from vllm_kvcompress.bench.gpu.row import Row
from vllm_kvcompress.bench.gpu.skipped import need_gpu
from vllm_kvcompress.kernels.library import find_nvcc

OF_MEMORY = 0.9  # what vLLM takes by default
PACKAGES = ("torch", "triton", "vllm", "transformers", "flashinfer-python", "xformers")


def machine(_: Mapping[str, float]) -> Iterator[Row]:
    """The GPU, its free memory, and the software on it."""
    need_gpu()
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    yield Row(
        "GPU",
        f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
        f"{properties.multi_processor_count} multiprocessors",
    )
    found = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB"
    yield Row("free memory", found, f">= {OF_MEMORY:.0%}", free >= OF_MEMORY * total)
    here = [f"Python {sys.version.split()[0]}", f"CUDA {torch.version.cuda}"]
    yield Row("software", ", ".join([*here, *(_version(name) for name in PACKAGES)]))
    yield Row("nvcc", _nvcc())


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"no {package}"


def _nvcc() -> str:
    if (nvcc := find_nvcc()) is None:
        return "not here, so no CUDA kernels are built: Triton's do their work"
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    release = next((line for line in said.splitlines() if "release" in line), "")
    return f"{nvcc} {release.partition('release ')[2]}".rstrip()
