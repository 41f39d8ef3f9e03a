"""One shard: a safetensors file of many images' features, written piece by piece and checked.

First come the grids of all images (int64, so that every tensor stays aligned), then each image's
features. A pooled shard holds one row for each image, all of which together are one table
[images, width].

safetensors' own writer takes 0.36 s and as much memory again for the 256 MiB of a shard, and loses
the reason for which a disk refuses them; the pieces here are the tensors' own memory, and take
0.001 s. Headers are read without mapping the file: a bad disk raises instead of ending the process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vitrt import tensor_file
from vitrt.messages import one_line
from vitrt.store.durable import OutputError, discard, write_file
from vitrt.tensor_file import DTYPE_NAMES, DTYPES, Header, TensorFileError, build_header

FORMAT = "vitrt.features.v1"
NO_LAYERS = "none"
MERGE_SIZE = 2  # of every tower so far; a shard says its own
_BLOCK_BYTES = 1 << 20


def kinds_held(header: Header) -> Mapping[str, Set[str]]:
    """Image id -> the kinds of tensors that a shard holds of it ("embeddings", "grid_thw", ...)."""
    found: dict[str, set[str]] = {}
    for name in header.tensors:
        image_id, _, kind = name.rpartition("/")
        found.setdefault(image_id, set()).add(kind)
    return found


def kinds_of(metadata: Mapping[str, str]) -> frozenset[str]:
    """What each image in such a shard has, and besides, where the model has it, `deepstack`."""
    if metadata.get("pool") == "mean":
        return frozenset(["pooled"])
    kinds = ["embeddings", "grid_thw"]
    return frozenset([*kinds, "hidden"] if parse_layers(metadata) else kinds)


def parse_layers(metadata: Mapping[str, str]) -> tuple[int, ...]:
    """The layers whose hidden states a shard holds, in their order."""
    text = metadata.get("layers", NO_LAYERS)
    return () if text == NO_LAYERS else tuple(map(int, text.split(",")))


def merge_size_of(metadata: Mapping[str, str]) -> int:
    return int(metadata.get("merge_size", MERGE_SIZE))


def write_shard(
    path: Path, tensors: Sequence[tuple[str, Tensor]], metadata: Mapping[str, str]
) -> str:
    """Write a shard, all or nothing; returns its CRC-32 for `Entry.crc32`.

    The sum costs 0.08 s for 256 MiB, a third of what writing and flushing them does.
    """
    checksum = 0

    def summed() -> Iterator[memoryview]:
        nonlocal checksum
        for piece in encode_shard(tensors, metadata):
            checksum = crc32(piece, checksum)
            yield piece

    try:
        write_file(path, summed())
    except OutputError:
        discard(path)  # it may be complete, but is not listed
        raise
    return f"{checksum:08x}"


def file_crc32(path: Path) -> str:
    """The CRC-32 of what a file holds now."""
    checksum = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            checksum = crc32(block, checksum)
    return f"{checksum:08x}"


def encode_shard(
    tensors: Sequence[tuple[str, Tensor]], metadata: Mapping[str, str]
) -> list[memoryview]:
    """The bytes of a safetensors file, as pieces to write one after the other, without copies.

    `tensors` are contiguous, on the CPU, and ordered so that each is aligned to its own item size.
    ValueError where two have one name: nobody could read such a file.
    """
    described: dict[str, tuple[str, Sequence[int]]] = {}
    pieces: list[memoryview] = []
    offset = 0
    for name, tensor in tensors:
        assert tensor.device.type == "cpu" and tensor.is_contiguous(), name
        assert offset % tensor.itemsize == 0, f"{name} would start at byte {offset}"
        if name in described:
            raise ValueError(f"two tensors of one shard have the name {name!r}")
        described[name] = DTYPE_NAMES[tensor.dtype], tensor.shape
        offset += tensor.nbytes
        pieces.append(tensor.view(-1).view(torch.uint8).numpy().data)
    return [memoryview(build_header(described, metadata)), *pieces]


def read_header(path: Path) -> Header:
    """The header of a shard: what it says is possible, and covers its file without a gap.

    TensorFileError where the file is missing, cut short, or not in the format.
    """
    header = tensor_file.read_header(path)
    metadata, end = header.metadata, header.data_start
    if metadata.get("format") != FORMAT:
        raise TensorFileError(
            f"{path} has format {metadata.get('format')!r} in its metadata, not {FORMAT!r}"
        )
    _check_metadata(path, metadata)
    for name, span in sorted(header.tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if span.begin != end or span.dtype not in DTYPES:
            raise TensorFileError(
                f"{path}: tensor {name!r} of dtype {span.dtype} starts at byte {span.begin}, the "
                f"one before ends at {end}"
            )
        end = span.end
    if (size := path.stat().st_size) != end:
        raise TensorFileError(f"{path} holds {size} bytes where its header promises {end}")
    return header


def open_shard(path: Path) -> Any:
    """A shard mapped by safetensors, whose tensors are read when they are touched.

    TensorFileError where it is cut short or not in the format, OSError where there is none.
    """
    try:
        if one_line(str(path)) == str(path):
            return safe_open(path, framework="pt")
        # safetensors takes names in UTF-8 alone, so it is given the open file's.
        with path.open("rb") as file:
            return safe_open(f"/dev/fd/{file.fileno()}", framework="pt")
    except SafetensorError as error:
        raise TensorFileError(f"{path}: not as vitrt wrote it: {error}") from error


def _check_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    try:
        parse_layers(metadata)
        possible = merge_size_of(metadata) > 0
    except ValueError:
        possible = False
    if not possible:
        raise TensorFileError(
            f"{path} has merge_size {metadata.get('merge_size')!r} and layers "
            f"{metadata.get('layers')!r} in its metadata"
        )
