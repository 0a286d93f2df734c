"""A CUDA GPU that is not there: vLLM's own GPU worker and runners on CPU tensors.

For rehearsals. vLLM's CUDA platform is in force, Triton's kernels run in its interpreter, streams
do nothing, FlashAttention is computed in torch, and a CUDA graph is what was recorded while it was
captured (`recorded.py`). So all that Python does for a GPU is done; what it says about speed and
memory means nothing. Call `pretend` before vLLM is imported, in a process of its own.
"""

import os
import time
from contextlib import nullcontext
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

MEMORY_BYTES = 8 << 30
CAPABILITY = (9, 0)
ENVIRONMENT = {
    "TRITON_INTERPRET": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_USE_DEEP_GEMM": "0",
}


def pretend(engine: bool = True) -> None:
    """Turn this process into one of a host with a GPU; with `engine`, for vLLM's engines too."""
    os.environ |= ENVIRONMENT
    if engine:
        from triton.backends import backends

        active = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)
        backends.clear()
        backends["cpu" if "cpu" in version("vllm") else "nvidia"] = active
    _torch()
    from vllm_kvcompress.kernels import library

    library._has_gpu = lambda: False  # no code for GPUs is built or loaded
    if engine:
        from vllm_kvcompress.bench.gpu.operators import provide

        provide()
        _platform()
        _worker()


class Stream:
    """Everything happens at once here."""

    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        import torch

        self.device = torch.device("cpu")

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def _done(self, *_: Any) -> None:
        pass

    wait_stream = wait_event = record_event = synchronize = _done


class Event:
    """The host's clock."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._at = 0.0

    def record(self, stream: Any = None) -> None:
        self._at = time.perf_counter()

    def elapsed_time(self, end: "Event") -> float:
        return (end._at - self._at) * 1e3

    def query(self) -> bool:
        return True

    def _done(self, *_: Any) -> None:
        pass

    wait = synchronize = _done


def _torch() -> None:
    import torch
    import torch._dynamo  # it wants torch as it is

    from vllm_kvcompress.bench.gpu.recorded import CUDAGraph, capturing, graph

    here = Stream()
    properties = SimpleNamespace(
        name="no GPU (a rehearsal)",
        major=CAPABILITY[0],
        minor=CAPABILITY[1],
        multi_processor_count=4,
        total_memory=MEMORY_BYTES,
        is_integrated=False,
        L2_cache_size=1 << 20,
    )
    nothing = lambda *_, **__: None  # noqa: E731
    cuda: dict[str, Any] = {
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": CUDAGraph,
        "graph": graph,
        "current_stream": lambda *_: here,
        "default_stream": lambda *_: here,
        "stream": lambda *_: nullcontext(),
        "synchronize": nothing,
        "_sleep": nothing,
        "empty_cache": nothing,
        "graph_pool_handle": lambda: (0, 0),
        "is_current_stream_capturing": capturing,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_capability": lambda *_: CAPABILITY,
        "get_device_name": lambda *_: properties.name,
        "get_device_properties": lambda *_: properties,
        "mem_get_info": lambda *_: (MEMORY_BYTES, MEMORY_BYTES),
        "max_memory_allocated": lambda *_: 0,
        "reset_peak_memory_stats": nothing,
        "manual_seed_all": nothing,
        "manual_seed": nothing,
    }
    for name, stand_in in cuda.items():
        setattr(torch.cuda, name, stand_in)
    torch.cuda.memory.get_allocator_backend = lambda: "none"
    torch.Event = Event  # type: ignore[assignment, misc]
    accelerator: dict[str, Any] = {
        "synchronize": nothing,
        "empty_cache": lambda *_: None,
        "empty_host_cache": nothing,
        "reset_peak_memory_stats": nothing,
        "memory_stats": lambda *_: {},
        "max_memory_allocated": lambda *_: 0,
        "memory_reserved": lambda *_: 0,
        "memory_allocated": lambda *_: 0,
        "get_memory_info": lambda *_: (MEMORY_BYTES, MEMORY_BYTES),
        "device_count": lambda: 1,
    }
    for name, stand_in in accelerator.items():
        setattr(torch.accelerator, name, stand_in)


def _platform() -> None:
    from vllm import platforms
    from vllm.platforms.cuda import NonNvmlCudaPlatform

    class PretendedCuda(NonNvmlCudaPlatform):
        device_type = "cpu"  # of tensors
        dist_backend = "gloo"

        def __getattr__(self, name: str) -> Any:
            import torch

            return getattr(torch.cuda, name, None)

        @classmethod
        def is_pin_memory_available(cls) -> bool:
            return False

        @classmethod
        def device_count(cls) -> int:
            return 1

        @classmethod
        def opaque_attention_op(cls) -> bool:
            return False  # so that a graph records what attention does, not that it was called

        @classmethod
        def get_default_ir_op_priority(cls, vllm_config: Any) -> Any:
            from vllm.config.kernel import IrOpPriorityConfig

            return IrOpPriorityConfig.with_default(["native"])

    platforms._current_platform = PretendedCuda()


def _worker() -> None:
    from vllm.utils import torch_utils
    from vllm.v1.sample.ops import topk_topp_sampler
    from vllm.v1.worker import gpu_worker

    def init_device(self: Any) -> None:
        import torch
        from vllm.utils.mem_utils import MemorySnapshot
        from vllm.v1.worker.utils import request_memory

        self.device = torch.device("cpu")
        gpu_worker.init_worker_distributed_environment(
            self.vllm_config, self.rank, self.distributed_init_method, self.local_rank, "gloo"
        )
        gpu_worker.set_random_seed(self.model_config.seed)
        self.init_snapshot = MemorySnapshot(device=self.device)
        self.requested_memory = request_memory(self.init_snapshot, self.cache_config)
        self._init_workspace_and_model_runner()

    torch_utils.prev_set_stream = lambda stream: None  # called by its `torch.cuda.set_stream`
    gpu_worker.Worker.init_device = init_device
    topk_topp_sampler.HAS_TRITON = False  # the interpreter does not know all of its kernels
    gpu_worker.kernel_warmup = lambda *_, **__: None  # of kernels for other models and hardware
