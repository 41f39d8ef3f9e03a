"""One shard: a safetensors file of many images' features, as bytes to write and a header to check.

First come the grids of all images (int64, so that every tensor stays aligned), then each image's
features. A pooled shard holds one row for each image, all of which together are one table
[images, width].
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMAT = "vitrt.features.v1"
DTYPE_CODES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
}
_ITEM_BYTES = {code: dtype.itemsize for dtype, code in DTYPE_CODES.items()}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


class ShardError(ValueError):
    """A file that is not a whole, valid shard."""


@dataclass(frozen=True, slots=True)
class TensorSpan:
    """A tensor's place in the data part of a shard, in bytes."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class ShardHeader:
    """What a shard says it holds."""

    metadata: dict[str, str]
    tensors: dict[str, TensorSpan]  # in the order of the file
    data_start: int


def encode_shard(
    tensors: Sequence[tuple[str, Tensor]], metadata: Mapping[str, str]
) -> list[memoryview]:
    """The bytes of a safetensors file, as pieces to write one after the other, without copies.

    `tensors` are contiguous, on the CPU, and ordered so that each is aligned to its own item size.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    pieces: list[memoryview] = []
    offset = 0
    for name, tensor in tensors:
        assert tensor.device.type == "cpu" and tensor.is_contiguous(), name
        assert offset % tensor.itemsize == 0, f"{name} would start at byte {offset}"
        header[name] = {
            "dtype": DTYPE_CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
        pieces.append(tensor.view(-1).view(torch.uint8).numpy().data)
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [memoryview(len(text).to_bytes(8, "little") + text), *pieces]


def read_header(path: Path) -> ShardHeader:
    """The header of a shard, checked against the size of its file.

    Raises:
        ShardError: the file is missing, cut short, or not in the format.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise ShardError(f"{path} is cut short inside its header")
            parsed = json.loads(file.read(length))
    except OSError as error:
        raise ShardError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        if isinstance(error, ShardError):
            raise
        raise ShardError(f"{path} has a header that is not JSON: {error}") from error
    header = _parse(path, parsed, data_start=8 + length)
    end = max((span.end for span in header.tensors.values()), default=0)
    if size != header.data_start + end:
        raise ShardError(
            f"{path} holds {size} bytes where its header promises {header.data_start + end}"
        )
    return header


def _parse(path: Path, parsed: Any, data_start: int) -> ShardHeader:
    try:
        metadata = parsed.pop("__metadata__", {})
        if metadata.get("format") != FORMAT:
            raise ShardError(
                f"{path} has format {metadata.get('format')!r} in its metadata, not {FORMAT!r}"
            )
        tensors = {
            name: TensorSpan(entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
            for name, entry in parsed.items()
        }
        for name, span in tensors.items():
            count = 1
            for side in span.shape:
                count *= side
            if span.end - span.begin != count * _ITEM_BYTES[span.dtype]:
                raise ShardError(
                    f"{path}: tensor {name!r} of shape {list(span.shape)} and dtype {span.dtype} "
                    f"covers {span.end - span.begin} bytes"
                )
    except (AttributeError, KeyError, TypeError) as error:
        raise ShardError(f"{path} has a header of another form: {error!r}") from error
    return ShardHeader(metadata, tensors, data_start)
