"""Where a section runs: on a GPU, or where one is only pretended (`pretend.py`)."""

import os

import torch

REHEARSAL = os.environ.get("KV_COMPRESS_REHEARSAL") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not REHEARSAL else "cpu"
