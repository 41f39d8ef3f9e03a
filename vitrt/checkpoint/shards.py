"""The safetensors file format: check a header, read parts of a tensor, write tensor by tensor.

Plain reads instead of a memory map: pages of a mapped shard count as this process's memory, and a
file that shrinks while it is mapped kills the process.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
COPY_BYTES = 4 << 20
LENGTH_BYTES = 8  # a file starts with the length of its header

FLOAT_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "U64": 64, "I32": 32, "U32": 32}
_BITS |= {"I16": 16, "U16": 16, "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "C64": 64}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names it, the file and what is wrong."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies."""

    file: Path
    full_name: str  # as the file names it
    shape: tuple[int, ...]
    dtype: str  # as the file names it: "BF16", "F32", ...
    offset: int  # bytes from the start of the file
    nbytes: int


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, from its header alone.

    Raises CheckpointError for a file that is missing, truncated or not in the format.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(LENGTH_BYTES)
            length = header_length(start, file, size)
            header = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    return parse_header(header, file, size)


def header_length(start: bytes, file: Path, size: int) -> int:
    """The length of the header, from a file's first eight bytes and its size."""
    if len(start) < LENGTH_BYTES:
        raise CheckpointError(f"{file}: {size} bytes are no safetensors file")
    (length,) = struct.unpack("<Q", start)
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"{file}: not a safetensors file (a header of {length} bytes)")
    if LENGTH_BYTES + length > size:
        raise CheckpointError(f"{file}: truncated: {size} bytes end inside the header")
    return int(length)


def parse_header(header: bytes, file: Path, size: int) -> dict[str, TensorInfo]:
    """The tensors a header names, checked against each other and against the size of the file."""
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        tensors = {
            name: _tensor_info(name, entry, file, LENGTH_BYTES + len(header))
            for name, entry in entries.items()
        }
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file}: the header is no safetensors header: {error}") from error
    end = max((info.offset + info.nbytes for info in tensors.values()), default=size)
    if end > size:
        raise CheckpointError(f"{file}: truncated: its header says {end} bytes, it has {size}")
    return tensors


def _tensor_info(name: str, entry: Mapping[str, Any], file: Path, data: int) -> TensorInfo:
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    dtype = entry["dtype"]
    numbers = (begin, end, *shape)
    if not all(isinstance(number, int) and number >= 0 for number in numbers) or end < begin:
        raise CheckpointError(f"{file}: {name}: shape {shape} at bytes {begin} to {end}")
    bits = _BITS.get(dtype)
    if bits is not None and prod(shape) * bits != 8 * (end - begin):
        raise CheckpointError(
            f"{file}: {name}: shape {list(shape)} of {dtype} does not take {end - begin} bytes"
        )
    return TensorInfo(file, name, shape, dtype, data + begin, end - begin)


class StoredTensor:
    """A tensor on disk. Indexing reads no more rows or (of a matrix) columns than asked for."""

    def __init__(self, stream: BinaryIO, info: TensorInfo) -> None:
        self._stream = stream
        self._info = info

    def get_shape(self) -> list[int]:
        return list(self._info.shape)

    def __getitem__(self, index: Any) -> Tensor:
        index = index if isinstance(index, tuple) else (index,)
        shape = self._info.shape
        if not shape or not isinstance(index[0], slice) or index[0].step not in (None, 1):
            return self._read(0, self._info.nbytes).view(shape)[index]
        if len(shape) == 2 and _is_some_columns(index, shape):
            return self._columns(index[1])
        start, stop, _ = index[0].indices(shape[0])
        rows = max(stop - start, 0)
        row_bytes = self._info.nbytes // max(shape[0], 1)
        part = self._read(start * row_bytes, rows * row_bytes).view(rows, *shape[1:])
        rest = (slice(None), *index[1:])
        return part[rest]

    def _columns(self, columns: slice) -> Tensor:
        """[rows, columns] of a matrix, each row's part by itself."""
        rows, width = self._info.shape
        first, stop, _ = columns.indices(width)
        row_bytes = self._info.nbytes // rows
        item = row_bytes // width
        dtype = FLOAT_DTYPES[self._info.dtype]
        part = torch.empty(rows, max(stop - first, 0), dtype=dtype, device="cpu")
        if part.numel():  # a rank may have nothing but padding
            for row, target in enumerate(part.view(torch.uint8).numpy()):
                self._read_into(target, row * row_bytes + first * item)
        return part

    def _read(self, start: int, count: int) -> Tensor:
        buffer = torch.empty(count, dtype=torch.uint8, device="cpu")
        self._read_into(buffer.numpy(), start)
        return buffer.view(FLOAT_DTYPES[self._info.dtype])

    def _read_into(self, target: np.ndarray, start: int) -> None:
        self._stream.seek(self._info.offset + start)
        got = self._stream.readinto(target)  # type: ignore[attr-defined]
        if got != target.size:
            raise CheckpointError(
                f"{self._info.file}: truncated: {self._info.full_name} ends after {got} of "
                f"{target.size} bytes"
            )


def _is_some_columns(index: tuple[Any, ...], shape: tuple[int, ...]) -> bool:
    """Whether `index` is all rows of some of the columns."""
    if len(index) != 2 or index[0] != slice(None) or not isinstance(index[1], slice):
        return False
    return index[1].step in (None, 1) and len(range(*index[1].indices(shape[1]))) < shape[1]


def build_header(
    tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a file that holds `tensors` in their order, and where each one starts."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    offsets: dict[str, int] = {}
    end = 0
    for name, info in tensors.items():
        begin, end = end, end + info.nbytes
        offsets[name] = begin
        shape = list(info.shape)
        entries[name] = {"dtype": info.dtype, "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the data starts aligned
    data = LENGTH_BYTES + len(header)
    offsets = {name: data + begin for name, begin in offsets.items()}
    return struct.pack("<Q", len(header)) + header, offsets


def aligned_order(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Widest dtypes first: every tensor is aligned to its elements, as safetensors writes them."""
    order = sorted(tensors, key=lambda name: (-_BITS[tensors[name].dtype], name))
    return {name: tensors[name] for name in order}


def copy_bytes(source: BinaryIO, target: BinaryIO, info: TensorInfo) -> None:
    """The bytes of a tensor, from its file to where `target` stands, in bounded pieces."""
    source.seek(info.offset)
    left = info.nbytes
    while left:
        piece = source.read(min(left, COPY_BYTES))
        if not piece:
            raise CheckpointError(f"{info.file}: truncated: {info.full_name} lacks {left} bytes")
        target.write(piece)
        left -= len(piece)
