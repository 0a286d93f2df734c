"""What a scorer may look at."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Observation:
    """One layer of one request: its candidates and the queries that judge them.

    H KV heads, G query heads per KV head, n candidates, w queries, D head size. Candidates
    stand in ascending order of position; padding, if any, stands last. What a scorer declares
    not to need may come empty (w = 0, or D = 0); the other sizes always hold.

    queries: `[w, H, G, D]` f32 or bf16, after RoPE.
    query_positions: `[w]` int64, absolute.
    keys, values: `[H, n, D]`, keys after RoPE.
    positions: `[n]` int64, absolute; `[H, n]` once heads hold different tokens.
    valid: `[H, n]` bool, False for padding; None when there is none.
    scale: the factor of the logits before their softmax.
    """

    queries: Tensor
    query_positions: Tensor
    keys: Tensor
    values: Tensor
    positions: Tensor
    valid: Tensor | None
    scale: float

    @property
    def heads(self) -> int:
        return self.keys.shape[0]

    @property
    def tokens(self) -> int:
        return self.keys.shape[1]

    def head_positions(self) -> Tensor:
        """Absolute positions per head, int64 `[H, n]`."""
        return self.positions.expand(self.heads, self.tokens)
