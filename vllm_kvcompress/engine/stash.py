"""Hidden states of prompts in prefill, kept until the last chunk says which of them go on."""

import torch
from torch import Tensor


class Stash:
    """A fixed pool of token slots, `[capacity, hidden]`, lent to requests for their prompts."""

    def __init__(
        self, capacity_tokens: int, hidden_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._states = torch.empty(capacity_tokens, hidden_size, dtype=dtype, device=device)
        self._free = torch.arange(capacity_tokens, device=device)
        self._slots: dict[str, Tensor] = {}

    @staticmethod
    def bytes_of(capacity_tokens: int, hidden_size: int, dtype: torch.dtype) -> int:
        return capacity_tokens * hidden_size * dtype.itemsize

    def put(self, request_id: str, tokens: int, first: int, states: Tensor) -> None:
        """Keep `states [count, hidden]` of a prompt of `tokens` tokens, from token `first` on.

        Raises:
            RuntimeError: the pool is too small, which the scheduler sees to that it never is.
        """
        if request_id not in self._slots:
            if tokens > len(self._free):
                raise RuntimeError(
                    f"{tokens} hidden states do not fit: {len(self._free)} of "
                    f"{len(self._states)} slots are free"
                )
            self._slots[request_id] = self._free[:tokens]
            self._free = self._free[tokens:]
        self._states[self._slots[request_id][first : first + len(states)]] = states

    def get(self, request_id: str, positions: Tensor) -> Tensor:
        """The states at `positions [m]`, `[m, hidden]`."""
        return self._states[self._slots[request_id][positions]]

    def release(self, request_id: str) -> None:
        """Take back a request's slots, if it has any."""
        slots = self._slots.pop(request_id, None)
        if slots is not None:
            self._free = torch.cat([self._free, slots])

    @property
    def free_tokens(self) -> int:
        return len(self._free)
