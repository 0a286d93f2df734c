"""The CUDA page kernels, built for this CPU (`cuda_on_host.h`) and called by their C interface."""

import ctypes
import subprocess
from ctypes import POINTER, Structure, c_float, c_int, c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc/pages").glob("*.cu"))
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class Attention(Structure):
    _fields_ = (
        fields(c_void_p, "queries keys values tables lengths out partial weights")
        + fields(c_int64, "query_stride query_head_stride key_page_stride key_token_stride")
        + fields(c_int64, "value_page_stride value_token_stride table_stride")
        + fields(c_int64, "out_stride out_head_stride")
        + fields(c_int32, "sequences group head_size page_tokens splits dtype")
        + fields(c_float, "scale softcap")
    )


class Compaction(Structure):
    _fields_ = (
        fields(c_void_p, "keys values candidates kept arena_blocks")
        + fields(c_int64, "key_page_stride key_token_stride value_page_stride value_token_stride")
        + fields(c_int64, "tokens")
        + fields(c_int32, "pages blocks lanes page_tokens head_size element_bytes")
    )


def build(compiler: str, folder: Path) -> ctypes.CDLL:
    """Compile the `.cu` files as C++.

    Raises:
        subprocess.CalledProcessError: they do not compile.
    """
    library = folder / "pages.so"
    command = [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", "-x", "c++", *SOURCES]
    command += [f"-I{ROOT / 'csrc'}", f"-I{Path(__file__).parent}", "-o", library]
    subprocess.run([*command, '-DKVC_ON_HOST="cuda_on_host.h"'], check=True)
    pages = ctypes.CDLL(str(library))
    pages.kvc_attend_pages.argtypes = [POINTER(Attention), c_void_p]
    pages.kvc_compact.argtypes = [POINTER(Compaction), c_void_p]
    pages.kvc_attend_pages.restype = pages.kvc_compact.restype = c_int
    return pages


def attend_pages(
    library: ctypes.CDLL,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    lengths: Tensor,
    scale: float,
    out: Tensor,
    splits: int = 1,
    softcap: float = 0.0,
) -> int:
    """As the Triton kernel of that name; returns the error code."""
    sequences, group, size = queries.shape
    partial = torch.full((splits, sequences, group, size), torch.nan)
    weights = torch.full((splits, sequences, group), torch.nan)
    tensors = (queries, keys, values, tables, lengths, out, partial, weights)
    arguments = Attention(
        *(tensor.data_ptr() for tensor in tensors),
        *queries.stride()[:2],
        *keys.stride()[:2],
        *values.stride()[:2],
        tables.stride(0),
        *out.stride()[:2],
        sequences,
        group,
        size,
        keys.shape[1],
        splits,
        DTYPES[queries.dtype],
        scale,
        softcap,
    )
    return library.kvc_attend_pages(arguments, None)


def compact(
    library: ctypes.CDLL,
    keys: Tensor,
    values: Tensor,
    candidates: Tensor,
    tokens: int,
    kept: Tensor,
    arena_blocks: Tensor,
) -> int:
    """As the Triton kernel of that name; returns the error code."""
    layers, heads, pages = candidates.shape
    arguments = Compaction(
        *(tensor.data_ptr() for tensor in (keys, values, candidates, kept, arena_blocks)),
        *keys.stride()[:2],
        *values.stride()[:2],
        tokens,
        pages,
        len(arena_blocks),
        layers * heads,
        keys.shape[1],
        keys.shape[-1],
        keys.element_size(),
    )
    return library.kvc_compact(arguments, None)
