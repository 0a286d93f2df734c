"""What a compression chooses from."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_kvcompress.policy.ranking import row_blocks


@dataclass(frozen=True, slots=True)
class Candidates:
    """Tokens of one request, per layer and head.

    pages: int64 `[L, H, P]`; positions: int `[n]` or `[L, H, P*B]`.
    valid: bool `[L, H, P*B]`, or None when all candidates are.
    """

    pages: Tensor
    positions: Tensor
    valid: Tensor | None

    @property
    def tokens(self) -> int:
        return self.positions.shape[-1]

    @staticmethod
    def kept_before(
        counts: Tensor, arena: Tensor, tail: Tensor, positions: Tensor, n: int, page_tokens: int
    ) -> "Candidates":
        """What was kept at an earlier point and the full tail since, at n tokens.

        Args:
            counts: int64 `[L, H]` kept pages; arena: int64 `[L, H, P]` their ids, then padding.
            tail: int64 `[L, H, S]` natural pages.
            positions: int32, of the kept tokens in (layer, head) order.
        """
        kept_pages, tail_pages = arena.shape[-1], tail.shape[-1]
        pages = torch.cat([arena, torch.zeros_like(tail)], dim=-1)
        pages.scatter_(2, counts[..., None] + torch.arange(tail_pages, device=tail.device), tail)
        column = torch.arange((kept_pages + tail_pages) * page_tokens, device=tail.device)
        kept_tokens, tail_tokens = counts[..., None] * page_tokens, tail_pages * page_tokens
        first = (kept_tokens.view(-1).cumsum(0) - kept_tokens.view(-1)).view(kept_tokens.shape)
        where = torch.empty(
            *counts.shape, len(column), dtype=positions.dtype, device=positions.device
        )
        for block in row_blocks(len(where), where[0].numel()):
            kept = positions[(first[block] + column).clamp_(max=len(positions) - 1)]
            since = n - tail_tokens + column - kept_tokens[block]
            where[block] = torch.where(column < kept_tokens[block], kept, since)
        return Candidates(pages, where, column < kept_tokens + tail_tokens)

    def of_layer(self, layer: int) -> "Candidates":
        """What scorers see of one layer: the same without the dimension L."""
        shared = self.positions.dim() == 1
        return Candidates(
            self.pages[layer],
            self.positions if shared else self.positions[layer].long(),
            None if self.valid is None else self.valid[layer],
        )

    def positions_of(self, kept: Tensor) -> Tensor:
        """Positions, int32 `[T]`, of candidates named by indices into `[L, H, n]`."""
        found = torch.empty(kept.shape, dtype=torch.int32, device=kept.device)
        for block in row_blocks(len(kept), 1):
            lane, token = kept[block] // self.tokens, kept[block] % self.tokens
            if self.positions.dim() == 1:
                found[block] = self.positions[token]
            else:
                heads = self.positions.shape[1]
                found[block] = self.positions[lane // heads, lane % heads, token]
        return found

    def as_one_layer(self) -> "Candidates":
        """Those of one layer with a dimension L = 1."""
        shared = self.positions.dim() == 1
        return Candidates(
            self.pages[None],
            self.positions if shared else self.positions[None],
            None if self.valid is None else self.valid[None],
        )

    def passed_on(self, scores: Tensor, leader: int, layer: int) -> Tensor:
        """Scores `[H, n]` of the leader's candidates as those of another layer's."""
        return scores


@dataclass(frozen=True, slots=True)
class SelectedCandidates(Candidates):
    """After token-selective propagation: a prompt whose deep layers hold only selected tokens.

    Layers above `tsp_layer` have them densely in their first pages. The candidates are the
    tokens of full blocks, P = floor(n / B); scorers see the partly filled block too.

    tail_pages: int64 `[L, H, 1]`, or `[L, H, 0]`.
    selected: int64 `[m]`, ascending positions.
    """

    tsp_layer: int
    tail_pages: Tensor
    selected: Tensor

    @staticmethod
    def of(
        pages: Tensor, page_tokens: int, n: int, selected: Tensor, tsp_layer: int
    ) -> "SelectedCandidates":
        """From the natural pages `[L, H, ceil(n / B)]` of a prompt of n tokens."""
        full = n // page_tokens
        tokens, held = full * page_tokens, len(selected) // page_tokens * page_tokens
        layers, heads, _ = pages.shape  # what heads share is there once
        positions = torch.arange(tokens, device=pages.device).repeat(layers, 1, 1)
        positions[tsp_layer + 1 :, :, :held] = selected[:held]
        valid = torch.ones_like(positions, dtype=torch.bool)
        valid[tsp_layer + 1 :, :, held:] = False
        return SelectedCandidates(
            pages[..., :full],
            positions.expand(-1, heads, -1),
            valid.expand(-1, heads, -1),
            tsp_layer,
            pages[..., full:],
            selected,
        )

    def of_layer(self, layer: int) -> Candidates:
        pages = self.pages[layer]
        page_tokens = self.tokens // pages.shape[-1]
        prompt_tokens = self.tokens + len(self.selected) % page_tokens
        positions = torch.arange(prompt_tokens, device=pages.device)
        if layer > self.tsp_layer:
            positions = self.selected
            pages = pages[:, : len(positions) // page_tokens]
        return Candidates(torch.cat([pages, self.tail_pages[layer]], dim=-1), positions, None)

    def passed_on(self, scores: Tensor, leader: int, layer: int) -> Tensor:
        if leader <= self.tsp_layer < layer:
            return scores.gather(-1, self.positions[layer])
        return scores
