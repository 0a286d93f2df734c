"""The codec's CUDA kernels in `csrc/codec/`, called through their C interface.

They have not run on a GPU yet. `kernels.library.cuda_library` finds or builds them.
"""

import ctypes
from ctypes import POINTER, Structure, c_int, c_int32, c_size_t, c_uint64, c_void_p
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vllm_kvcompress.transport.codec import DTYPES, CorruptChunk, Encoded, Tables, codebook
from vllm_kvcompress.transport.levels import Plan

VALUE_BITS = {"bfloat16": torch.int16, "float16": torch.int16, "float32": torch.int32}


class CudaError(RuntimeError):
    """A launch was refused."""


class EncodedOnDevice(NamedTuple):
    """Sections one after another, and how each channel was coded."""

    records: Tensor  # uint8 [sections, channels, 4]
    data: Tensor  # uint8, all sections
    ends: Tensor  # int64 [sections]: where each ends in data


class CudaSectionCodec:
    """`SectionCodec` on a device: the same bytes.

    Raises:
        OSError: there is no such library.
    """

    def __init__(self, library: Path | str, device: torch.device | str = "cuda") -> None:
        functions = ctypes.CDLL(str(library))
        self._scratch_bytes = {
            _Encoding: functions.kvc_encoding_scratch,
            _Decoding: functions.kvc_decoding_scratch,
        }
        self._code = {_Encoding: functions.kvc_encode, _Decoding: functions.kvc_decode}
        for kind, function in self._scratch_bytes.items():
            function.argtypes, function.restype = [POINTER(kind)], c_size_t
        for kind, function in self._code.items():
            function.argtypes, function.restype = [POINTER(kind), c_void_p], c_int
        self.device = torch.device(device)
        functions.kvc_tables_bytes.restype = c_size_t
        functions.kvc_fill_tables.argtypes = [c_void_p] * 3
        book, filled = codebook(), np.zeros(functions.kvc_tables_bytes(), np.uint8)
        frequencies, spreads = map(np.ascontiguousarray, (book["frequencies"], book["spreads"]))
        pointers = (array.ctypes.data for array in (frequencies, spreads, filled))
        if not functions.kvc_fill_tables(*pointers):
            raise ValueError("the codebook has a table that does not add up")
        self._tables = torch.from_numpy(filled).to(self.device)

    def encode(
        self,
        values: Tensor,
        dtype: str,
        plan: Plan,
        tables: Tables | None = None,
        *,
        heads: int = 1,
        relative: bool = True,
    ) -> EncodedOnDevice:
        """`values` holds the bits of `dtype`, int16 or int32 `[sections, tokens, channels]`.

        As `SectionCodec.encode`. Waits for the device, to know how large the sections are.

        Raises:
            CudaError: the kernels do not take this shape, or a launch failed.
        """
        sections, tokens, channels = values.shape
        _expect(values, VALUE_BITS[dtype])
        parameters = plan.parameters
        if parameters.ndim == 1:
            parameters = np.repeat(parameters[:, None], heads, axis=1)
        room = values.numel() * values.element_size() + 4096 * sections
        profile = self._profile(tables)
        held = [self._put(plan.quantisers), self._put(parameters.astype(np.float32)), *profile]
        records = self._empty(sections, channels, 4)
        ends = torch.empty(sections, dtype=torch.int64, device=self.device)
        while True:
            out = self._empty(room)
            call = _Encoding(
                *(_pointer(x) for x in (values, *held, self._tables, None, records, out, ends)),
                *(room, sections, tokens, channels, heads),
                *(DTYPES.index(dtype), relative),
            )
            self._run(call)
            size = int(ends[-1])
            if size <= room:
                return EncodedOnDevice(records, out[:size], ends)
            room = size

    def decode(
        self,
        data: Tensor,
        ends: Tensor,
        records: Tensor,
        dtype: str,
        out: Tensor,
        tables: Tables | None = None,
    ) -> None:
        """Fill `out` as `SectionCodec.decode` does. Waits for the device, to know of faults.

        Raises:
            CorruptChunk: bytes that no encoder wrote; `out` is then undefined.
            CudaError: the kernels do not take this shape, or a launch failed.
        """
        for tensor, kind in ((data, torch.uint8), (ends, torch.int64), (records, torch.uint8)):
            _expect(tensor, kind)
        _expect(out, VALUE_BITS[dtype])
        profile = self._profile(tables)
        faults = torch.empty(len(out), dtype=torch.int32, device=self.device)
        call = _Decoding(
            *(_pointer(x) for x in (data, ends, records, *profile, self._tables)),
            *(None, _pointer(out), _pointer(faults)),
            *(len(data), *out.shape, DTYPES.index(dtype)),
        )
        self._run(call)
        if faults.any():
            raise CorruptChunk(f"section {int(faults.nonzero()[0])} is damaged")

    def _run(self, call: Structure) -> None:
        scratch = self._empty(self._scratch_bytes[type(call)](call))
        call.scratch = scratch.data_ptr()
        stream = torch.cuda.current_stream(self.device).cuda_stream if scratch.is_cuda else None
        code = self._code[type(call)]
        if error := code(call, stream):
            raise CudaError(f"CUDA error {error} from {code.__name__}")

    def _profile(self, tables: Tables | None) -> tuple[Tensor | None, Tensor | None]:
        if tables is None:
            return None, None
        return self._put(tables.frequencies.view(np.int16)), self._put(tables.channels)

    def _put(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.uint8, device=self.device)


class CudaSections:
    """`SectionCodec` for values on a device: only what is coded travels.

    Arguments and errors as of `CudaSectionCodec`.
    """

    isa = "CUDA"

    def __init__(self, library: Path | str, device: torch.device | str = "cuda") -> None:
        self._codec = CudaSectionCodec(library, device)

    def encode(
        self,
        values: Tensor,
        dtype: str,
        plan: Plan,
        tables: Tables | None = None,
        *,
        heads: int = 1,
        relative: bool = True,
    ) -> Encoded:
        on_device = self._codec.encode(values, dtype, plan, tables, heads=heads, relative=relative)
        records, data, ends = (tensor.cpu().numpy() for tensor in on_device)
        sections = np.split(data, ends[:-1])
        return Encoded(records, [section.tobytes() for section in sections])

    def decode(
        self,
        data: np.ndarray,
        ends: np.ndarray,
        records: np.ndarray,
        dtype: str,
        out: Tensor,
        tables: Tables | None = None,
    ) -> None:
        coded = map(self._upload, (data, ends.astype(np.int64), records))
        self._codec.decode(*coded, dtype, out, tables)

    def _upload(self, array: np.ndarray) -> Tensor:
        device = self._codec.device
        kind = torch.int64 if array.dtype == np.int64 else torch.uint8
        staged = torch.empty(array.shape, dtype=kind, pin_memory=device.type == "cuda")
        staged.numpy()[...] = array
        return staged.to(device, non_blocking=True)


def _expect(tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype or not tensor.is_contiguous():
        raise ValueError(f"{dtype} in one piece is needed, this is {tensor.dtype}")


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class _Encoding(Structure):
    """`struct kvc_encoding`."""

    _fields_ = (
        _fields(c_void_p, "values quantisers parameters profile_frequencies profile_channels")
        + _fields(c_void_p, "tables scratch records out ends")
        + _fields(c_uint64, "capacity")
        + _fields(c_int32, "sections tokens channels heads dtype relative")
    )


class _Decoding(Structure):
    """`struct kvc_decoding`."""

    _fields_ = (
        _fields(c_void_p, "data ends records profile_frequencies profile_channels")
        + _fields(c_void_p, "tables scratch values faults")
        + _fields(c_uint64, "bytes")
        + _fields(c_int32, "sections tokens channels dtype")
    )
