"""How a section says that there is nothing to measure here."""

import torch


class Skipped(Exception):
    """The message says why."""


def need_gpu() -> None:
    """Raises Skipped where torch sees none."""
    if not torch.cuda.is_available():
        raise Skipped("torch sees no CUDA GPU")
