"""A device that is not the host, made of host memory, and a watch on who waits for it.

Tensors made under `Device()` say that they are on `DEVICE`. What would make the host wait for a GPU
fails, and so does what a GPU refuses: mixing its tensors with the host's. The interpreter's kernels
take such tensors as they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from triton.runtime.interpreter import GridExecutor

DEVICE = torch.device("meta")  # any that torch knows without having it
HOST = torch.device("cpu")
ASKS = {
    "_local_scalar_dense",
    "_unique",
    "_unique2",
    "allclose",
    "bincount",
    "equal",
    "histc",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
    "unique_dim_consecutive",
}


class Waits(AssertionError):
    """The host would wait for the device here."""


def refuse_waiting(function: Any, args: Any, kwargs: Any) -> None:
    """Raise where the shape or the value of an operator's result must come to the host.

    Raises:
        Waits: it does.
    """
    name = function.overloadpacket.__name__
    if name in ASKS:
        raise Waits(f"{function} waits for the device")
    if name == "repeat_interleave" and kwargs.get("output_size") is None:
        raise Waits(f"{function} waits for the device: give it output_size")
    if name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"):
        for at in args[1]:
            if at is not None and at.dtype in (torch.bool, torch.uint8):
                raise Waits(f"{function} waits for the device: a mask has an unknown length")


class NoWaiting(TorchDispatchMode):
    """Takes every tensor for one of a device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        refuse_waiting(function, args, kwargs or {})
        return function(*args, **(kwargs or {}))


class DeviceTensor(Tensor):
    """A tensor of the device; `held` is its memory."""

    @staticmethod
    def __new__(cls, held: Tensor) -> "DeviceTensor":
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )

    def __init__(self, held: Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


class Device(TorchDispatchMode):
    """New tensors for `DEVICE` are `DeviceTensor`s; nobody waits for one."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        with self:
            parts = function.decompose(*args, **(kwargs or {}))
        return _run(function, args, kwargs or {}) if parts is NotImplemented else parts


def _run(function: Any, args: Any, kwargs: Any) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if any(not isinstance(tensor, DeviceTensor) and tensor.device == DEVICE for tensor in tensors):
        raise Waits(f"{function} waits for the device: a copy of numbers from the host")
    there = {id(tensor.held): tensor for tensor in tensors if isinstance(tensor, DeviceTensor)}
    target = kwargs.get("device")
    made_there = bool(there) if target is None else target == DEVICE
    name = function.overloadpacket.__name__
    if name in ("copy_", "_to_copy"):
        made_there = _copies(function, args, kwargs)
    elif there:
        refuse_waiting(function, args, kwargs)
        if strangers := [t for t in tensors if not isinstance(t, DeviceTensor) and t.dim()]:
            raise RuntimeError(f"{function} mixes the device with the host: {strangers}")
    if target is not None:
        kwargs = {**kwargs, "device": HOST}
    if kwargs.get("pin_memory"):
        kwargs = {**kwargs, "pin_memory": False}
    result = function(*tree_map(memory_of, args), **tree_map(memory_of, kwargs))
    if not made_there:
        return result
    return tree_map(lambda out: _on_device(out, there), result)


def _on_device(value: Any, there: dict[int, DeviceTensor]) -> Any:
    """A result as a tensor of the device; an argument changed in place stays the same object."""
    if not isinstance(value, Tensor):
        return value
    return there[id(value)] if id(value) in there else DeviceTensor(value)


def _copies(function: Any, args: Any, kwargs: Any) -> bool:
    """Whether a copy's target is on the device.

    Raises:
        Waits: it is a copy between device and host, and the host waits for its end.
    """
    if function.overloadpacket.__name__ == "copy_":
        target, source = args[:2]
        onto, waits = isinstance(target, DeviceTensor), not (args[2:] or [False])[0]
        waits = waits and not kwargs.get("non_blocking")
    else:
        (source,), device = args, kwargs.get("device")
        onto = isinstance(source, DeviceTensor) if device is None else device == DEVICE
        waits = not kwargs.get("non_blocking")
    if isinstance(source, DeviceTensor) != onto and waits:
        raise Waits(f"{function} waits for the device: a copy between it and the host")
    return onto


def memory_of(value: Any) -> Any:
    return value.held if isinstance(value, DeviceTensor) else value


class Event:
    """A mark in the device's queue, which here has no length."""

    def __init__(self, **_: Any) -> None:
        pass

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


@contextmanager
def device_in_place_of_cuda() -> Iterator[None]:
    """`Device()`, whose tensors kernels take, with events."""
    launch = GridExecutor.__call__

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return launch(self, *map(memory_of, args), **tree_map(memory_of, kwargs))

    with (
        patch.object(GridExecutor, "__call__", launched),
        patch.object(torch.cuda, "Event", Event),
        Device(),
    ):
        yield
