"""Grow the demo model to 8 layers: ``python -m vllm_kvcompress.bench.demo_model.deepen``.

The shipped model looks its answer up in one layer, the third of four. Here four copies of that
layer are put above it, silent at first (their output projections are zero: block expansion, LLaMA
Pro, arXiv 2401.02415), and all eight layers train on. In some rows the attention of a layer that
looks up is switched off, of each by a toss of its own, so that none can leave it to another: the
model then looks up at ``L/2 - 1`` and on either side of it.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load_file
from torch import Tensor, nn

from .language import Mix
from .network import Network, Shape
from .tokenizer import MAX_POSITIONS
from .train import Phase, Trainer, run

SOURCES = (0, 1, 2, 2, 2, 2, 2, 3)  # which layer of the base each layer starts from
LOOK_UP = tuple(layer for layer, source in enumerate(SOURCES) if source == 2)
ADDED = LOOK_UP[1:]
DEEP = Shape(layers=len(SOURCES))
SWITCHED_OFF_RATE = 0.4  # of the rows, for each layer that looks up

CURRICULUM = (
    Phase(
        "deeper",
        tokens=800_000,
        lengths=(256, 512, 512, 1024),
        batch_tokens=4096,
        lr=(1.2e-3, 2e-5),
        mix=Mix((0.2, 0.95), (1, 64), 12),
        max_jump=MAX_POSITIONS,
    ),
)


class Deepener(Trainer):
    """A trainer that starts from a shallower model's weights."""

    stored = torch.bfloat16

    def __init__(self, seed: int, base: Path) -> None:
        super().__init__(seed, CURRICULUM, DEEP)
        expand(self.network, load_file(base / "model.safetensors"))
        self._tosses = torch.Generator()
        for layer in LOOK_UP:
            attention = self.network.layers[layer].self_attn
            attention.o_proj.register_forward_pre_hook(self._switch_off)

    def step(self) -> None:
        where = f"{self.seed}/switched off/{self.progress['phase']}/{self.progress['step']}"
        self._tosses.manual_seed(random.Random(where).getrandbits(60))
        super().step()

    def _switch_off(self, _: nn.Module, arguments: tuple[Any, ...]) -> tuple[Tensor]:
        """Zero what a layer's attention `[B, T, Hq * dim]` found, in some of the rows."""
        (found,) = arguments
        heard = torch.rand(len(found), 1, 1, generator=self._tosses) >= SWITCHED_OFF_RATE
        return (found * heard,)


@torch.no_grad()
def expand(network: Network, base: dict[str, Tensor]) -> None:
    """Give the layers of `network` the weights that `SOURCES` says, the added ones silent."""
    for name, parameter in network.named_parameters():
        parts = name.split(".")
        if parts[0] == "layers":
            parts[1] = str(SOURCES[int(parts[1])])
        parameter.copy_(base["model." + ".".join(parts)][: len(parameter)])
    for layer in ADDED:
        nn.init.zeros_(network.layers[layer].self_attn.o_proj.weight)
        nn.init.zeros_(network.layers[layer].mlp.down_proj.weight)


def deepen(
    base: Annotated[Path, typer.Option(help="The 4-layer model to start from.")] = Path(
        "vllm_kvcompress/demo_model"
    ),
    out: Annotated[Path, typer.Option(help="Folder of the loadable model.")] = Path(
        "vllm_kvcompress/demo_model_deep"
    ),
    work: Annotated[
        Path, typer.Option(help="Folder of the training state; a run found here is continued.")
    ] = Path("build/demo_model_deep_state"),
    seed: Annotated[int, typer.Option(help="Decides every row.")] = 18,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    stop_after_s: Annotated[
        float, typer.Option(help="Save and stop after so many seconds (run again to go on).")
    ] = float("inf"),
) -> None:
    """Grow the 4-layer demo model to 8 layers of which five look up.

    The bar shows the share of answer tokens predicted right while layers are switched off.
    Interrupt and run again at will: it goes on from the state last saved in --work.
    """
    torch.set_num_threads(threads)
    run(Deepener(seed, base), out, work, stop_after_s)


if __name__ == "__main__":
    typer.run(deepen)
