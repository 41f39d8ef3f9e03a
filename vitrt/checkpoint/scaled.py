"""Weights stored in fp8 with scales, and what else quantised checkpoints hold.

Releases in FP8, AWQ, GPTQ and so on mostly leave the tower in bfloat16: its tensors load as they
are, whatever the config says of the language model. Where the tower itself is quantised, its linear
weights may be e4m3 with one scale for all, for a row or for a block of rows and columns:

    scheme                                   scales              shape, of a weight [N, K]
    fp8 (fine-grained, as DeepSeek's)        weight_scale_inv    [N / block, K / block]
    compressed-tensors, fbgemm_fp8, Quark    weight_scale        [1], [N, 1] or blocks
    ModelOpt                                 weight_scale        [], [N], [N / 128, 1, K / 128, 1]

In all of them, the "inverse" ones too, a weight is its code times its scale.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vitrt.checkpoint.shards import (
    FLOAT_DTYPES,
    CheckpointError,
    LazyTensor,
    OneOpenFile,
    StoredTensor,
    TensorInfo,
)

FP8 = "F8_E4M3"
SCALES = ("weight_scale_inv", "weight_scale")
SCALE_DTYPES = (*FLOAT_DTYPES, "F8_E8M0")
# Scales of activations, which only a product in fp8 would use.
ACTIVATION_SCALES = ("input_scale", "input_scale_ub", "activation_scale")
DEFAULT_BLOCK = (128, 128)


def check_storage(
    tensors: Mapping[str, TensorInfo], quantization: Mapping[str, Any], where: str
) -> None:
    """CheckpointError for a tower stored in another way, naming the scheme and a tensor of it."""
    wrong = [
        f"{info.full_name} ({info.dtype})"
        for name, info in sorted(tensors.items())
        if not _is_readable(name, info, tensors)
    ]
    if wrong:
        scheme = quantization.get("quant_method") or quantization.get("quant_algo")
        named = f"quant_method {scheme!r}" if scheme else "a scheme that config.json does not name"
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise CheckpointError(
            f"{where}: the tower is quantised, by {named}, in a way that is not supported: "
            f"{wrong[0]}{more}; its tensors must be {', '.join(FLOAT_DTYPES)}, and its weights "
            f"may be {FP8} with {' or '.join(SCALES)}"
        )


def _is_readable(name: str, info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> bool:
    if info.dtype == FP8 and len(info.shape) > 1:
        scale = _scale_of(name, tensors)
        return scale is not None and tensors[scale].dtype in SCALE_DTYPES
    return info.dtype in FLOAT_DTYPES or (info.dtype in SCALE_DTYPES and _is_scale(name, tensors))


def _scale_of(name: str, tensors: Mapping[str, TensorInfo]) -> str | None:
    module, _, last = name.rpartition(".")
    names = [f"{module}.{scale}" for scale in SCALES if f"{module}.{scale}" in tensors]
    return names[0] if last == "weight" and len(names) == 1 else None


def _is_scale(name: str, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether a tensor is no parameter but belongs to a weight in fp8."""
    module, _, last = name.rpartition(".")
    weight = tensors.get(f"{module}.weight")
    scale = last in (*SCALES, *ACTIVATION_SCALES)
    return scale and weight is not None and weight.dtype == FP8


def parameters(
    tensors: Mapping[str, TensorInfo], quantization: Mapping[str, Any]
) -> Iterator[tuple[str, LazyTensor]]:
    """The tower's parameters out of what is stored for them, in the order of the files.

    CheckpointError for scales of a shape that no scheme has.
    """
    files, scale_files = OneOpenFile(), OneOpenFile()
    for name, info in sorted(tensors.items(), key=lambda pair: (pair[1].file, pair[1].offset)):
        if _is_scale(name, tensors):
            continue
        stored = StoredTensor(info, files)
        if info.dtype == FP8 and (scale := _scale_of(name, tensors)):
            yield (
                name,
                ScaledTensor(stored, StoredTensor(tensors[scale], scale_files), quantization),
            )
        else:
            yield name, stored


class ScaledTensor:
    """A weight in fp8 with its scales. Indexing gives their product in float32.

    `codes` and `scales` are what is stored, for products that take them as they are.
    """

    dtype = torch.float32

    def __init__(
        self, codes: StoredTensor, scales: StoredTensor, quantization: Mapping[str, Any]
    ) -> None:
        self.codes = codes
        self.scales = scales
        self.shape = codes.shape
        self.info = codes.info
        self.block = _block_of(codes, scales, quantization)  # rows and columns of one scale

    def __getitem__(self, index: Any) -> Tensor:
        part = self.codes[index].float()
        return part.mul_(self._expanded(index if isinstance(index, tuple) else (index,)))

    @cached_property
    def _matrix(self) -> Tensor:
        """One scale a block, [blocks of rows, blocks of columns]."""
        rows, columns = self.shape[0], self.shape[-1]
        grid = [-(-rows // self.block[0]), -(-columns // self.block[1])]
        return self.scales[...].float().reshape(grid)

    def _expanded(self, index: tuple[Any, ...]) -> Tensor:
        """The scales of the values at `index`, in a shape that goes with theirs."""
        if self._matrix.numel() == 1:
            return self._matrix.view(())
        row_blocks = torch.arange(self.shape[0]) // self.block[0]
        column_blocks = torch.arange(self.shape[-1]) // self.block[1]
        if self._matrix.shape[1] > 1:
            return self._matrix[row_blocks[:, None], column_blocks][index]
        each_row = self._matrix[row_blocks].view(-1, *[1] * (len(self.shape) - 1))
        return each_row.expand(self.shape)[index]


def _block_of(
    codes: StoredTensor, scales: StoredTensor, quantization: Mapping[str, Any]
) -> tuple[int, int]:
    """How many rows and columns share a scale, from the shapes and, for blocks, the config."""
    rows, columns = codes.shape[0], codes.shape[-1]
    shape = scales.shape
    if len(shape) == 4 and shape[1] == shape[3] == 1:
        shape = (shape[0], shape[2])
    if all(size == 1 for size in shape):
        return rows, columns
    if shape in ((rows,), (rows, 1)):
        return 1, columns
    if len(codes.shape) == len(shape) == 2:
        if shape[0] == rows and columns % shape[1] == 0:  # groups of one row
            return 1, columns // shape[1]
        for block in (*_blocks_of(quantization), DEFAULT_BLOCK):
            if shape == (-(-rows // block[0]), -(-columns // block[1])):
                return block
    blocks = " or ".join(map(str, (*_blocks_of(quantization), DEFAULT_BLOCK)))
    raise CheckpointError(
        f"{scales.info.file}: {scales.info.full_name} of shape {list(scales.shape)} does not go "
        f"with {codes.info.full_name} {list(codes.shape)}: there is one scale for all, for a row, "
        f"or for a block of {blocks}"
    )


def _blocks_of(quantization: Mapping[str, Any]) -> list[tuple[int, int]]:
    """The block sizes that a quantization_config names."""
    groups = quantization.get("config_groups")
    groups = groups.values() if isinstance(groups, Mapping) else ()
    weights = [group.get("weights") for group in groups if isinstance(group, Mapping)]
    named = [quantization.get("weight_block_size")]
    named += [each.get("block_structure") for each in weights if isinstance(each, Mapping)]
    blocks = []
    for block in named:
        pair = block if isinstance(block, list) and len(block) == 2 else ()
        if pair and all(isinstance(size, int) and size > 0 for size in pair):
            blocks.append((pair[0], pair[1]))
    return blocks
