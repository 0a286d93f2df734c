"""Grow the demo model to 8 layers: ``python -m vllm_kvcompress.bench.demo_model.deepen``.

The shipped model looks its answer up in its last layer, where nothing is left to be saved above.
Here four copies of that layer are put on top of it, silent at first (their output projections are
zero: block expansion, LLaMA Pro, arXiv 2401.02415), and all eight layers train on. In a quarter of
the rows the attention of a layer is switched off, of each retrieving layer by its own toss, so that
none can leave the looking up to another: what was the last layer is layer ``L/2 - 1`` and still
looks up, and so do those above it.
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
from .network import Shape
from .tokenizer import MAX_POSITIONS
from .train import Phase, Trainer, run

DEEP = Shape(layers=8)
COPIED = 3  # the layer that looks up
SILENT_RATE = 0.25  # rows in which a retrieving layer's attention is switched off

CURRICULUM = (
    Phase(
        "deeper",
        tokens=2_000_000,
        lengths=(256, 512, 512, 1024, 1024, 2048),
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
        for layer in self.network.layers[COPIED:]:
            layer.self_attn.o_proj.register_forward_pre_hook(self._switch_off)

    def step(self) -> None:
        where = f"{self.seed}/silent/{self.progress['phase']}/{self.progress['step']}"
        self._tosses.manual_seed(random.Random(where).getrandbits(60))
        super().step()

    def _switch_off(self, _: nn.Module, arguments: tuple[Any, ...]) -> tuple[Tensor]:
        """Zero what a layer's attention `[B, T, Hq * dim]` found, in some of the rows."""
        (found,) = arguments
        heard = torch.rand(len(found), 1, 1, generator=self._tosses) >= SILENT_RATE
        return (found * heard,)


@torch.no_grad()
def expand(network: nn.Module, base: dict[str, Tensor]) -> None:
    """Give `network` the weights of `base`, and the layers it lacks those of `COPIED`, silent."""
    for name, parameter in network.named_parameters():
        parts = name.split(".")
        if parts[0] == "layers" and int(parts[1]) > COPIED:
            parts[1] = str(COPIED)
        source = base["model." + ".".join(parts)]
        parameter.copy_(source[: len(parameter)])
    for layer in network.layers[COPIED + 1 :]:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)


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
    """Grow the 4-layer demo model to 8 layers of which the upper five look up.

    The bar shows the share of answer tokens predicted right while layers are switched off.
    Interrupt and run again at will: it goes on from the state last saved in --work.
    """
    torch.set_num_threads(threads)
    run(Deepener(seed, base), out, work, stop_after_s)


if __name__ == "__main__":
    typer.run(deepen)
