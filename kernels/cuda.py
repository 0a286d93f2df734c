"""The CUDA kernels of `csrc/pages/`, called through their C interface (`kernels/library.py`)."""

import ctypes
from ctypes import POINTER, Structure, c_float, c_int, c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # enum kvc_dtype


class CudaError(RuntimeError):
    """A launch was refused."""


class CudaPages:
    """`attend_pages` and `compact` as the Triton kernels of these names, by a built library.

    The CUDA kernels take fewer shapes: rows of D elements aligned to 16 bytes; attention: at most
    8 query heads per KV head, D at most 256, B a power of two; compaction: B at most 256.

    Raises:
        OSError: there is no such library.
    """

    def __init__(self, library: Path | str) -> None:
        functions = ctypes.CDLL(str(library))
        self._attend, self._compact = functions.kvc_attend_pages, functions.kvc_compact
        self._attend.argtypes = [POINTER(_Attention), c_void_p]
        self._compact.argtypes = [POINTER(_Compaction), c_void_p]
        self._attend.restype = self._compact.restype = c_int

    def attend_pages(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        tables: Tensor,
        lengths: Tensor,
        scale: float,
        out: Tensor,
        splits: int = 1,
        softcap: float = 0.0,
    ) -> None:
        """See `kernels.attention.attend_pages`.

        Raises:
            CudaError: the kernel does not take these shapes, or the launch failed.
        """
        sequences, group, size = queries.shape
        partial = queries.new_empty((splits, sequences, group, size), dtype=torch.float32)
        weights = queries.new_empty((splits, sequences, group), dtype=torch.float32)
        tensors = (queries, keys, values, tables, lengths, out, partial, weights)
        arguments = _Attention(
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
        _check(self._attend(arguments, _stream(queries)), f"attend_pages of {list(queries.shape)}")

    def compact(
        self,
        keys: Tensor,
        values: Tensor,
        candidates: Tensor,
        tokens: int,
        kept: Tensor,
        arena_blocks: Tensor,
    ) -> None:
        """See `kernels.compaction.compact`.

        Raises:
            CudaError: the kernel does not take these shapes, or the launch failed.
        """
        layers, heads, pages = candidates.shape
        candidates = candidates.contiguous()
        arguments = _Compaction(
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
        _check(self._compact(arguments, _stream(keys)), f"compact in pages {list(keys.shape)}")


def _stream(tensor: Tensor) -> int | None:
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else None


def _check(error: int, what: str) -> None:
    if error:
        raise CudaError(f"CUDA error {error} from {what}")


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class _Attention(Structure):
    """`struct kvc_attention`."""

    _fields_ = (
        _fields(c_void_p, "queries keys values tables lengths out partial weights")
        + _fields(c_int64, "query_stride query_head_stride key_page_stride key_token_stride")
        + _fields(c_int64, "value_page_stride value_token_stride table_stride")
        + _fields(c_int64, "out_stride out_head_stride")
        + _fields(c_int32, "sequences group head_size page_tokens splits dtype")
        + _fields(c_float, "scale softcap")
    )


class _Compaction(Structure):
    """`struct kvc_compaction`."""

    _fields_ = (
        _fields(c_void_p, "keys values candidates kept arena_blocks")
        + _fields(c_int64, "key_page_stride key_token_stride value_page_stride value_token_stride")
        + _fields(c_int64, "tokens")
        + _fields(c_int32, "pages blocks lanes page_tokens head_size element_bytes")
    )
