"""A policy: a scorer, an allocator and a selector, and the rules that hold for all of them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_kvcompress.accounting import ceil_div
from vllm_kvcompress.policy.interfaces import Allocator, Propagator, Scorer, Selector
from vllm_kvcompress.policy.ranking import MarkedScores, row_blocks

# Scores beyond it are cut, so that the sum of a page stays finite.
MAX_SCORE = 1e30


@dataclass(frozen=True)
class Kept:
    """What stays of a request.

    pages: int64 `[L, H]`.
    indices: int64 `[pages.sum() * B]` into the flat `[L, H, n]` candidates, ascending.
    """

    pages: Tensor
    indices: Tensor


@dataclass(frozen=True)
class Policy:
    """Who scores, who allocates, who selects.

    propagator: says which tokens of a prompt go on above `tsp_layer`; None: all of them.
    group_layers: how many consecutive layers share one scoring: one of them, the leader, is
        scored, the others take its scores. With an allocator that gives the layers of a group
        the same pages, they keep the same tokens.
    group_leader: which of a group's layers leads, counted from 0.
    """

    scorer: Scorer
    allocator: Allocator
    selector: Selector
    propagator: Propagator | None = None
    group_layers: int = 1
    group_leader: int = 0

    def leader(self, layer: int) -> int:
        """The layer whose scores `layer` takes."""
        return layer - layer % self.group_layers + self.group_leader

    def keep(
        self,
        scores: Tensor,
        total_pages: int,
        page_tokens: int,
        sinks: int,
        recent: int,
        valid: Tensor | None = None,
        inplace: bool = False,
    ) -> Kept:
        """Choose what stays.

        Whatever the scores are (NaN counts as the lowest), the first `sinks` and the last
        `recent` valid candidates of every head stay, padding never does.

        Args:
            scores: `[L, H, n]` f32 from `scorer`, one slice per layer.
            total_pages: pages to keep over all layers and heads.
            page_tokens: tokens per page.
            sinks, recent: protected tokens per head.
            valid: `[L, H, n]` bool, False for padding.
            inplace: write over `scores`, which spares a copy of them.

        What would have to wait for a GPU is checked on a CPU only.

        Raises:
            ValueError: `total_pages` cannot be met: too few for the protected tokens, or more
                than the candidates fill.
            RuntimeError: an allocator or selector broke its contract.
        """
        layers, heads, n = scores.shape
        min_pages = max(1, ceil_div(min(sinks + recent, n), page_tokens))
        if valid is None:
            max_pages = torch.full((layers, heads), n // page_tokens, device=scores.device)
        else:
            max_pages = valid.sum(dim=-1) // page_tokens
        host = scores.device.type == "cpu"
        if host:
            _check_total(total_pages, page_tokens, min_pages, max_pages)
        own = scores.float() if inplace else scores.to(torch.float32, copy=True)
        marked = MarkedScores(_mark(own, sinks, recent, valid))
        pages = self.allocator.allocate(marked, total_pages, page_tokens, min_pages, max_pages)
        if host and int(pages.sum()) != total_pages:
            raise RuntimeError(
                f"{type(self.allocator).__name__} allocated {int(pages.sum())} pages, "
                f"not {total_pages}"
            )
        indices = self.selector.select(marked, pages, total_pages, page_tokens)
        if len(indices) != total_pages * page_tokens:
            raise RuntimeError(
                f"{type(self.selector).__name__} kept {len(indices)} tokens, not {total_pages} "
                f"pages of {page_tokens}"
            )
        return Kept(pages, indices)


def _check_total(total_pages: int, page_tokens: int, min_pages: int, max_pages: Tensor) -> None:
    fewest, most, heads = int(max_pages.min()), int(max_pages.sum()), max_pages.numel()
    if not heads * min_pages <= total_pages <= most or fewest < min_pages:
        raise ValueError(
            f"cannot keep {total_pages} pages of {page_tokens} tokens: {heads} heads "
            f"need {min_pages} each, the poorest can fill {fewest}, all together {most}"
        )


def _mark(scores: Tensor, sinks: int, recent: int, valid: Tensor | None) -> Tensor:
    """`scores` made finite, except `+inf` for protected candidates and `-inf` for padding."""
    n = scores.shape[-1]
    scores.clamp_(-MAX_SCORE, MAX_SCORE).nan_to_num_(nan=-MAX_SCORE)
    if valid is None:
        scores[..., :sinks] = torch.inf
        scores[..., max(0, n - recent) :] = torch.inf
        return scores
    for block in row_blocks(len(scores), scores[0].numel()):
        own, real = scores[block], valid[block]
        ordinal = real.cumsum(dim=-1, dtype=torch.int32)
        protected = (ordinal <= sinks) | (ordinal > ordinal[..., -1:] - recent)
        own.masked_fill_(protected, torch.inf).masked_fill_(~real, -torch.inf)
    return scores
