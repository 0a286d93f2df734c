"""Which tokens fill the pages."""

from dataclasses import dataclass

from torch import Tensor

from vllm_kvcompress.policy.interfaces import Selector
from vllm_kvcompress.policy.ranking import largest
from vllm_kvcompress.policy.registry import register_selector


@register_selector("top-k")
@dataclass(frozen=True)
class TopKSelector(Selector):
    """The best tokens of each head; among equals the earlier one."""

    def select(self, scores: Tensor, pages: Tensor, page_tokens: int) -> Tensor:
        return largest(scores, pages * page_tokens).view(-1).nonzero().view(-1)
