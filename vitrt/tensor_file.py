"""The safetensors format, once: its dtypes, a header read and checked, a header written.

safetensors' own reader gives no byte offsets, without which a tower's bytes cannot be fetched alone
(a tenth of a repository), and maps files: pages of a mapped file count as memory of this process,
and a file that shrinks while it is mapped kills it. Its writer wants all tensors in memory at once,
where writing one after the other takes less than a third of a tower.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from vitrt.messages import reason_of

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
LENGTH_BYTES = 8  # a file starts with the length of its header

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorFileError(ValueError):
    """A file that is missing, cut short or not in the format; the message names it."""


@dataclass(frozen=True, slots=True)
class TensorSpan:
    """Where a tensor lies in its file."""

    dtype: str  # as the file names it; one that `DTYPES` does not have is no error
    shape: tuple[int, ...]
    begin: int  # bytes from the start of the file
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says it holds."""

    metadata: dict[str, str]
    tensors: dict[str, TensorSpan]  # in the order of the header
    data_start: int  # bytes from the start of the file

    @property
    def data_end(self) -> int:
        return max((span.end for span in self.tensors.values()), default=self.data_start)


def read_header(file: Path) -> Header:
    """The header of a file on this machine.

    Raises TensorFileError for a file that is missing, truncated or not in the format.
    """
    try:
        with file.open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(0)
            length = header_length(stream.read(LENGTH_BYTES), file, size)
            text = stream.read(length)
    except OSError as error:
        raise TensorFileError(f"{file}: cannot be read: {reason_of(error)}") from error
    return parse_header(text, file, size)


def header_length(start: bytes, file: Path, size: int) -> int:
    """The length of the header, from a file's first eight bytes and its size."""
    if len(start) < LENGTH_BYTES:
        raise TensorFileError(f"{file}: {size} bytes are no safetensors file")
    (length,) = struct.unpack("<Q", start)
    if length > MAX_HEADER_BYTES:
        raise TensorFileError(f"{file}: not a safetensors file (a header of {length} bytes)")
    if LENGTH_BYTES + length > size:
        raise TensorFileError(f"{file}: truncated: {size} bytes end inside the header")
    return int(length)


def parse_header(text: bytes, file: Path, size: int) -> Header:
    """What the header of `file` says, checked in itself and against the `size` of the file."""
    try:
        entries = json.loads(text)
        metadata = entries.pop("__metadata__", {})
        start = LENGTH_BYTES + len(text)
        tensors = {name: _span(name, entry, file, start) for name, entry in entries.items()}
    except TensorFileError:
        raise
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise TensorFileError(f"{file}: the header is no safetensors header: {error}") from error
    wrong = not isinstance(metadata, dict) or any(type(v) is not str for v in metadata.values())
    if wrong:
        raise TensorFileError(f"{file}: its metadata are not all text: {str(metadata)[:200]}")
    header = Header(metadata, tensors, start)
    if header.data_end > size:
        raise TensorFileError(
            f"{file}: truncated: its header says {header.data_end} bytes, it has {size}"
        )
    return header


def _span(name: str, entry: Mapping[str, Any], file: Path, data_start: int) -> TensorSpan:
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    dtype = entry["dtype"]
    numbers = (begin, end, *shape)
    if any(type(number) is not int or number < 0 for number in numbers) or end < begin:
        raise TensorFileError(f"{file}: {name}: shape {shape} at bytes {begin} to {end}")
    known = DTYPES.get(dtype)
    if known is not None and prod(shape) * known.itemsize != end - begin:
        raise TensorFileError(
            f"{file}: {name}: shape {list(shape)} of {dtype} does not take {end - begin} bytes"
        )
    return TensorSpan(dtype, shape, data_start + begin, data_start + end)


def build_header(
    tensors: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str]
) -> bytes:
    """The first bytes of a file that holds tensors of these dtypes and shapes in this order."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + prod(shape) * DTYPES[dtype].itemsize
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    return struct.pack("<Q", len(text)) + text
