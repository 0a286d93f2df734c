"""vLLM on a CPU with its Triton kernels, and ours, in Triton's interpreter.

vLLM takes Triton on a CPU only with a backend for it; here the interpreter stands for one. It
needs a process of its own (`test_kernels_apart.py`), with all of this set before vLLM is imported.
"""

import os
from types import SimpleNamespace

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # inductor would ask the stand-in for a compiler

import torch
from triton.backends import backends

backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)
torch.cuda.get_device_capability = lambda device=None: (9, 0)  # asked for by vLLM's cache kernel
