"""Which tokens fill the pages."""

from dataclasses import dataclass

from torch import Tensor

from vllm_kvcompress.policy.interfaces import Selector
from vllm_kvcompress.policy.ranking import MarkedScores, indices_of, largest
from vllm_kvcompress.policy.registry import register_selector


@register_selector("top-k")
@dataclass(frozen=True)
class TopKSelector(Selector):
    """The best tokens of each head; among equals the earlier one."""

    def select(
        self, scores: MarkedScores, pages: Tensor, total_pages: int, page_tokens: int
    ) -> Tensor:
        best = largest(scores.values, pages * page_tokens, scores.ascending)
        return indices_of(best, total_pages * page_tokens)
