"""vLLM's CUDA platform, GPU worker and runners, on a GPU that is only pretended.

Needs a process of its own (`test_kernels_apart.py`), pretending before vLLM is imported.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from vllm_kvcompress.bench.gpu.pretend import pretend

pretend()
