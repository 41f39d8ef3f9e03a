"""Tensors on disk: where each one lies, and reading no more of it than is asked for.

Plain reads instead of a memory map: pages of a mapped shard count as this process's memory, and a
file that shrinks while it is mapped kills the process.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from torch import Tensor

from vitrt import tensor_file
from vitrt.messages import reason_of
from vitrt.tensor_file import DTYPES, Header, TensorFileError

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")


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
        return tensors_of(tensor_file.read_header(file), file)
    except TensorFileError as error:
        raise CheckpointError(str(error)) from error


def tensors_of(header: Header, file: Path) -> dict[str, TensorInfo]:
    return {
        name: TensorInfo(file, name, span.shape, span.dtype, span.begin, span.nbytes)
        for name, span in header.tensors.items()
    }


class LazyTensor(Protocol):
    """A tensor of which indexing reads, or computes, only a part."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that indexing gives."""
        ...

    @property
    def info(self) -> TensorInfo:
        """The stored tensor that it is, or is mostly made of."""
        ...

    def __getitem__(self, index: Any) -> Tensor: ...


class OneOpenFile:
    """Reads parts of files, and keeps the last one open."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._stream: BinaryIO | None = None

    def read_into(self, target: np.ndarray, info: TensorInfo, start: int) -> None:
        """Fill `target` (bytes) with what lies `start` bytes into a tensor."""
        try:
            got = self._read_into(target, info.file, info.offset + start)
        except OSError as error:
            raise CheckpointError(f"{info.file}: cannot be read: {reason_of(error)}") from error
        if got != target.size:
            raise CheckpointError(
                f"{info.file}: truncated: {info.full_name} ends after {got} of {target.size} bytes"
            )

    def _read_into(self, target: np.ndarray, path: Path, start: int) -> int:
        if path != self._path or self._stream is None:
            self.close()
            self._stream = path.open("rb", buffering=0)  # a buffer would copy what is read at once
            self._path = path
        self._stream.seek(start)
        got = 0
        # One read may give less than is there: over a network or from a FUSE file system.
        while got < target.size and (count := self._stream.readinto(target[got:])):  # type: ignore[attr-defined]
            got += count
        return got

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self._path = self._stream = None

    def __del__(self) -> None:
        self.close()


class StoredTensor:
    """A tensor on disk. Indexing reads no more rows or (of a matrix) columns than asked for."""

    def __init__(self, info: TensorInfo, files: OneOpenFile | None = None) -> None:
        self.info = info
        self.shape = info.shape
        self.dtype = DTYPES[info.dtype]
        self._files = files or OneOpenFile()

    def __getitem__(self, index: Any) -> Tensor:
        index = index if isinstance(index, tuple) else (index,)
        shape = self.shape
        if not shape or not isinstance(index[0], slice) or index[0].step not in (None, 1):
            return self._read(0, self.info.nbytes).view(shape)[index]
        if len(shape) == 2 and _is_some_columns(index, shape):
            return self._columns(index[1])
        start, stop, _ = index[0].indices(shape[0])
        rows = max(stop - start, 0)
        row_bytes = self.info.nbytes // max(shape[0], 1)
        part = self._read(start * row_bytes, rows * row_bytes).view(rows, *shape[1:])
        rest = (slice(None), *index[1:])
        return part[rest]

    def _columns(self, columns: slice) -> Tensor:
        """[rows, columns] of a matrix, each row's part by itself."""
        rows, width = self.shape
        first, stop, _ = columns.indices(width)
        row_bytes = self.info.nbytes // rows
        item = row_bytes // width
        part = torch.empty(rows, max(stop - first, 0), dtype=self.dtype, device="cpu")
        if part.numel():  # a rank may have nothing but padding
            for row, target in enumerate(part.view(torch.uint8).numpy()):
                self._files.read_into(target, self.info, row * row_bytes + first * item)
        return part

    def _read(self, start: int, count: int) -> Tensor:
        buffer = torch.empty(count, dtype=torch.uint8, device="cpu")
        self._files.read_into(buffer.numpy(), self.info, start)
        return buffer.view(self.dtype)


def _is_some_columns(index: tuple[Any, ...], shape: tuple[int, ...]) -> bool:
    """Whether `index` is all rows of some of the columns."""
    if len(index) != 2 or index[0] != slice(None) or not isinstance(index[1], slice):
        return False
    return index[1].step in (None, 1) and len(range(*index[1].indices(shape[1]))) < shape[1]
