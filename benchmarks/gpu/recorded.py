"""CUDA graphs on a CPU: what ran while one was captured, run again with the same arguments.

As on a GPU, a replay does not run Python again: addresses, shapes and scalars are those of the
capture, and only what stands in memory may have changed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction

_recording: list["_Recorder"] = []


class CUDAGraph:
    """In the place of `torch.cuda.CUDAGraph`."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.calls: list[Callable[[], None]] = []

    def replay(self) -> None:
        with torch.inference_mode():
            for call in self.calls:
                call()

    def reset(self) -> None:
        self.calls.clear()


@contextmanager
def graph(cuda_graph: CUDAGraph, *_: Any, **__: Any) -> Iterator[None]:
    """In the place of `torch.cuda.graph`: runs what is inside, and records it."""
    with _Recorder(cuda_graph):
        yield


def capturing() -> bool:
    return bool(_recording)


class _Recorder(TorchDispatchMode):
    def __init__(self, cuda_graph: CUDAGraph) -> None:
        super().__init__()
        self._calls = cuda_graph.calls

    def __enter__(self) -> Any:
        _recording.append(self)
        self._launch = InterpretedFunction.run
        calls, launch = self._calls, self._launch

        def run(kernel: Any, *args: Any, **kwargs: Any) -> Any:
            with _disable_current_modes():
                calls.append(lambda: launch(kernel, *args, **kwargs))
                return launch(kernel, *args, **kwargs)

        InterpretedFunction.run = run
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        InterpretedFunction.run = self._launch
        _recording.pop()
        super().__exit__(*raised)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        if _waits(function):
            raise RuntimeError(f"{function} waits for the device while a graph is captured")
        given = {_place(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        fresh = [leaf for leaf in made if _place(leaf) not in given]
        if fresh:
            self._calls.append(lambda: _again(function, args, kwargs, made))
        elif function._schema.is_mutable:
            self._calls.append(lambda: function(*args, **kwargs))
        return out


def _waits(function: Any) -> bool:
    name = function._schema.name.split("::")[-1]
    return name in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "_unique2")


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _again(function: Any, args: Any, kwargs: Any, made: list[Tensor]) -> None:
    """Run it once more, into the tensors that it made at the capture."""
    new = [leaf for leaf in tree_leaves(function(*args, **kwargs)) if isinstance(leaf, Tensor)]
    for then, now in zip(made, new, strict=True):
        if then.data_ptr() != now.data_ptr():
            then.copy_(now)
