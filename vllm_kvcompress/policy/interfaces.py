"""The parts of a policy: who scores, who allocates, who selects, who propagates.

L layers, H KV heads of this rank, n candidates, B tokens per page. All are pure: the
answer for a request depends on its own tensors only, never on what else is in the batch.
On a GPU none should ask a tensor for a number (`.item()`, `nonzero`, a mask as an index): the
host would wait for the device.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from vllm_kvcompress.policy.observation import Observation
from vllm_kvcompress.policy.ranking import MarkedScores


class Scorer(ABC):
    """Says how much each candidate is worth.

    A scorer that sets a `needs_*` to False spares the engine from keeping that tensor aside.
    One that sets `shared_by_heads` gives all heads of a layer the same scores, means over heads;
    under tensor parallelism they are averaged over the ranks. Its candidates must be the same
    for all heads (`Observation.positions` is `[n]`), so it cannot judge a second time.
    """

    needs_queries: ClassVar[bool] = True
    needs_keys: ClassVar[bool] = True
    needs_values: ClassVar[bool] = True
    shared_by_heads: ClassVar[bool] = False

    @abstractmethod
    def score(self, obs: Observation, layer: int) -> Tensor:
        """f32 `[H, n]`, higher = keep. Padding may get anything: it is masked later."""


class Allocator(ABC):
    """Deals the pages of a request out to its layers and heads."""

    @abstractmethod
    def allocate(
        self,
        scores: MarkedScores,
        total_pages: int,
        page_tokens: int,
        min_pages: int,
        max_pages: Tensor,
    ) -> Tensor:
        """int64 `[L, H]`, summing to `total_pages`, each from `min_pages` to its `max_pages`.

        Args:
            scores: of n candidates of each head; the first `min_pages` pages of every head have
                room for the protected tokens.
            total_pages: pages of the request over all layers and heads.
            page_tokens: B.
            min_pages: the least that every head gets.
            max_pages: int64 `[L, H]`, the full pages that a head's candidates could fill.
        """


class Selector(ABC):
    """Picks the tokens that fill the pages of each head."""

    @abstractmethod
    def select(
        self, scores: MarkedScores, pages: Tensor, total_pages: int, page_tokens: int
    ) -> Tensor:
        """Kept tokens as indices into the flat scores, int64 `[total_pages * B]`, ascending.

        So they are grouped by (layer, head) and sorted by position inside a head, and each head
        has exactly `pages[l, h] * B` of them; `total_pages` is the sum of `pages`.
        """


class Propagator(ABC):
    """Says how much each token of a prompt matters to the layers above `tsp_layer`.

    One that sets `needs_values` to False spares the engine from gathering them.
    """

    needs_values: ClassVar[bool] = True

    @abstractmethod
    def saliency(self, obs: Observation, layer: int) -> Tensor:
        """f32 `[n]`, higher = propagate; summed over this rank's heads.

        The candidates are all tokens of the prompt. Under tensor parallelism the ranks' answers
        are averaged, so that all select the same tokens.
        """
