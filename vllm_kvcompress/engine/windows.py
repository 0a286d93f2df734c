"""The last queries before a compression point, kept aside while the chunks pass."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Capture:
    """Rows of this step's queries that belong to a window: `window[layer, first:] = q[rows]`."""

    window: "QueryWindow"
    first: int
    row: int
    count: int

    def take(self, layer: int, query: Tensor) -> None:
        """Copy this layer's `query [T, Hq, D]` rows; the model goes on unhindered."""
        target = self.window.queries(query)[layer, self.first : self.first + self.count]
        target.copy_(query[self.row : self.row + self.count])


class QueryWindow:
    """Queries of the positions `start .. end` of one request, all layers.

    The buffer, `[L, end - start, Hq, D]` of the queries' dtype, is made with the first of them.
    """

    def __init__(self, num_layers: int, start: int, end: int) -> None:
        self._num_layers = num_layers
        self.start, self.end = start, end
        self._buffer: Tensor | None = None

    def capture(self, first_token: int, num_tokens: int, row: int) -> Capture | None:
        """The part of the window among a step's tokens `first_token ...` from batch row `row`."""
        begin = max(self.start, first_token)
        count = min(self.end, first_token + num_tokens) - begin
        if count <= 0:
            return None
        return Capture(self, begin - self.start, row + begin - first_token, count)

    def queries(self, like: Tensor) -> Tensor:
        if self._buffer is None:
            self._buffer = like.new_empty(
                (self._num_layers, self.end - self.start, *like.shape[1:])
            )
        return self._buffer

    def layers(self, num_kv_heads: int) -> Tensor:
        """Queries of all layers as `[L, w, H, G, D]`."""
        assert self._buffer is not None, "the window's queries were never computed"
        return self._buffer.unflatten(2, (num_kv_heads, -1))

    def layer(self, layer: int, num_kv_heads: int) -> Tensor:
        """Queries of one layer as `[w, H, G, D]`."""
        return self.layers(num_kv_heads)[layer]

    def positions(self) -> Tensor:
        assert self._buffer is not None, "the window's queries were never computed"
        return torch.arange(self.start, self.end, device=self._buffer.device)
