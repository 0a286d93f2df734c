"""A number of the device that the host will want later, but will not wait for."""

import numpy as np
import torch
from torch import Tensor


class HostCopy:
    """A copy of a small tensor in the host's memory, made while the device works on.

    Asked for some steps later it is long there; asked for at once it is waited for.
    """

    def __init__(self, tensor: Tensor) -> None:
        if tensor.device.type == "cpu":
            self._copy, self._done = tensor.clone(), None
            return
        self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._copy.copy_(tensor, non_blocking=True)
        self._done = torch.cuda.Event()
        self._done.record()

    def numpy(self) -> np.ndarray:
        if self._done is not None:
            self._done.synchronize()
        return self._copy.numpy()
