"""What is swept: the settings to try, what each layer would select, and what a setting saves."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from vllm_kvcompress import accounting
from vllm_kvcompress.policy import Observation, build
from vllm_kvcompress.policy.propagators import select_positions
from vllm_kvcompress.policy.ranking import largest
from vllm_kvcompress.presets import Preset

MOST_CANDIDATES = 12


@dataclass(frozen=True)
class Candidate:
    """One setting to try.

    settings: what to give as `--kv-compress-config`.
    work: share of the work of not using it; the less, the better the setting.
    pairs: (a layer that selects, a layer that lives on its selection).
    """

    label: str
    settings: dict[str, Any]
    work: float
    pairs: tuple[tuple[int, int], ...]

    def overlap(self, overlaps: Tensor) -> float:
        """Mean share of what layers would select themselves that was selected for them."""
        if not self.pairs:
            return 1.0
        return float(torch.stack([overlaps[pair] for pair in self.pairs]).mean())

    def of(self, preset: Preset) -> Preset:
        """The preset with this setting, under a name of its own."""
        name = f"{preset.name}-{self.label.replace(', ', '-')}"
        return Preset(**{**preset.model_dump(), **self.settings, "name": name})


class Sweep(Protocol):
    """A setting of a preset that must be found out for each model."""

    setting: str
    work_title: str
    preset: Preset
    layers: int

    def candidates(self) -> list[Candidate]: ...

    def published(self) -> str:
        """The label of the candidate that the method's authors would choose."""
        ...

    def choose(self, obs: Observation, layer: int) -> Tensor:
        """What a layer would select by itself, bool `[H, n]`, without what all select anyway."""
        ...


@dataclass(frozen=True)
class TspLayerSweep:
    """`tsp_layer`: above it only selected tokens are computed (FastKV, arXiv 2502.01068).

    tried: layers to try; when empty, all, or twelve of them spread evenly over the model.
    """

    preset: Preset
    layers: int
    block_tokens: int
    prompt_tokens: int
    tried: Sequence[int] = ()
    setting = "tsp_layer"
    work_title = "layers x tokens computed"

    def __post_init__(self) -> None:
        if not self.preset.propagates:
            raise ValueError(
                f"preset {self.preset.name!r} propagates all tokens: take one with tsp_rate or "
                "tsp_tokens, such as fastkv"
            )
        for layer in self.tried:
            self.preset.model_copy(update={"tsp_layer": layer}).last_full_layer(self.layers)

    def candidates(self) -> list[Candidate]:
        last = self.layers - 2
        steps = min(MOST_CANDIDATES, self.layers - 1)
        spread = {round(i * last / max(1, steps - 1)) for i in range(steps)}
        tried = sorted(set(self.tried) or spread | {self._published_layer()})
        share = self._selected(self.prompt_tokens) / self.prompt_tokens
        return [
            Candidate(
                str(layer),
                {"tsp_layer": layer},
                (layer + 1 + (last - layer + 1) * share) / self.layers,
                tuple((layer, deep) for deep in range(layer + 1, self.layers)),
            )
            for layer in tried
        ]

    def published(self) -> str:
        return str(self._published_layer())

    def choose(self, obs: Observation, layer: int) -> Tensor:
        propagator, n = build(self.preset).propagator, obs.tokens
        assert propagator is not None
        count = self._selected(n)
        last = max(n % self.block_tokens, len(obs.query_positions))
        positions = select_positions(propagator.saliency(obs, layer), count, min(last, count))
        chosen = torch.zeros(1, n, dtype=torch.bool, device=positions.device)
        chosen[:, positions] = True
        return chosen[:, : n - last]

    def _selected(self, n: int) -> int:
        return accounting.tsp_selected_tokens(n, self.block_tokens, self.preset.settings()) or n

    def _published_layer(self) -> int:
        return self.preset.model_copy(update={"tsp_layer": None}).last_full_layer(self.layers)


@dataclass(frozen=True)
class GroupLayersSweep:
    """`group_layers`, `group_leader`: who shares one scoring (WindowKV, arXiv 2503.17922)."""

    preset: Preset
    layers: int
    block_tokens: int
    setting = "group_layers"
    work_title = "layers scored"

    def candidates(self) -> list[Candidate]:
        sizes = [size for size in range(1, self.layers + 1) if self.layers % size == 0]
        return [
            self._candidate(size, leader)
            for size in sizes
            for leader in ((0, "last") if size > 1 else (0,))
        ]

    def published(self) -> str:
        size = self.preset.model_copy(update={"group_layers": "quarter"})
        return self._candidate(size.layers_per_group(self.layers), 0).label

    def choose(self, obs: Observation, layer: int) -> Tensor:
        preset, n = self.preset, obs.tokens
        settings = preset.settings()
        plan = accounting.plan(n, self.block_tokens, 2**31, settings)
        scores = build(preset).scorer.score(obs, layer)
        full = n // self.block_tokens * self.block_tokens
        sinks, recent = accounting.protected_tokens(n, self.block_tokens, settings)
        free = scores[:, sinks : full - recent]
        count = plan.arena_blocks * self.block_tokens - sinks - recent
        counts = torch.full(free.shape[:1], max(0, count), device=free.device)
        return largest(free, counts.clamp(max=free.shape[1]))

    def _candidate(self, size: int, leader: int | str) -> Candidate:
        settings = {"group_layers": size} | ({"group_leader": leader} if leader else {})
        lead = size - 1 if leader == "last" else 0
        pairs = [
            (layer - layer % size + lead, layer)
            for layer in range(self.layers)
            if layer % size != lead
        ]
        label = f"{size}, {leader}" if leader else f"{size}"
        return Candidate(label, settings, 1 / size, tuple(pairs))


def overlaps(chosen: Sequence[Tensor]) -> Tensor:
    """Share of what the column's layer selects that the row's selects too, f32 `[L, L]`.

    Args:
        chosen: bool `[H, n]` of each layer; heads are averaged.
    """
    marks = torch.stack(list(chosen)).float()  # [L, H, n]
    both = torch.einsum("ahn,bhn->abh", marks, marks)
    return (both / marks.sum(dim=-1).clamp(min=1)).mean(dim=-1)
