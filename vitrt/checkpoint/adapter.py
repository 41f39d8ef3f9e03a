"""A PEFT LoRA over a checkpoint: what it changes in the tower, merged as the weights are read.

The arithmetic is that of PEFT's `merge_and_unload`: B A times lora_alpha / r (or / sqrt(r)), in
float32, added to the weight; tensors that the adapter holds whole (modules_to_save, biases) take
the place of the checkpoint's. The sum is rounded once, to the encoder's dtype, as it is by PEFT
over a base in that dtype (but for embeddings, where PEFT also rounds what is added).
"""

from __future__ import annotations

import logging
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
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
    read_header,
)
from vitrt.checkpoint.tower_files import ADAPTER_CONFIG, prefixes, read_json
from vitrt.messages import counted

logger = logging.getLogger(__name__)

ADAPTER_WEIGHTS = "adapter_model.safetensors"

# What changes the formula, or the weights of the base, in ways that are not followed here.
_UNSUPPORTED = (
    *("use_dora", "use_qalora", "use_bdlora", "alora_invocation_tokens", "layer_replication"),
    *("target_parameters", "arrow_config", "kasa_config", "monteclora_config"),
)
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")  # leave the base alone
# The parts of a pair, as an adapter names them after the module, and the tensor that they change.
_PARTS = {
    "lora_A.weight": "weight",
    "lora_B.weight": "weight",
    "lora_embedding_A": "weight",
    "lora_embedding_B": "weight",
    "lora_B.bias": "bias",
}
_PART = re.compile(rf"(.*)\.({'|'.join(map(re.escape, _PARTS))})")
_WHOLE = "whole"  # a tensor that takes the place of the checkpoint's


@dataclass(frozen=True, slots=True)
class Change:
    """What an adapter makes of one tensor of the tower."""

    parts: Mapping[str, TensorInfo]  # by the names in `_PARTS`, or `_WHOLE` alone
    scaling: float


@dataclass(frozen=True, slots=True)
class Adapter:
    """The changes of a LoRA to a tower, by the names of the tower's tensors."""

    name: str
    changes: Mapping[str, Change]

    def merge(
        self, parameters: Iterator[tuple[str, LazyTensor]]
    ) -> Iterator[tuple[str, LazyTensor]]:
        """The tower's parameters with the changes made, as they are read."""
        files = OneOpenFile()
        for name, tensor in parameters:
            change = self.changes.get(name)
            if change is None:
                yield name, tensor
            elif _WHOLE in change.parts:
                yield name, StoredTensor(change.parts[_WHOLE], files)
            else:
                yield name, AdaptedTensor(tensor, change, files)


class AdaptedTensor:
    """A tensor of the checkpoint plus what a LoRA adds. Indexing gives the sum in float32."""

    dtype = torch.float32

    def __init__(self, base: LazyTensor, change: Change, files: OneOpenFile) -> None:
        self.base = base
        self.info = base.info
        self.shape = base.shape
        self._change = change
        self._files = files
        if not _fit(self.shape, change.parts):
            raise CheckpointError(
                f"{self.info.full_name} {list(self.shape)} does not go with its adapter's "
                + ", ".join(f"{part} {list(info.shape)}" for part, info in change.parts.items())
            )

    def __getitem__(self, index: Any) -> Tensor:
        return self.base[index].float() + self._added[index]

    @cached_property
    def _added(self) -> Tensor:
        """Made whole even for a part of it, so that parts are those of the whole bit for bit."""
        part = {
            name: StoredTensor(info, self._files)[...].float()
            for name, info in self._change.parts.items()
        }
        if "lora_B.bias" in part:
            added = part["lora_B.bias"]
        elif "lora_embedding_A" in part:
            added = (part["lora_embedding_B"] @ part["lora_embedding_A"]).T
        else:  # of a convolution, B has a kernel of one
            added = part["lora_B.weight"].flatten(1) @ part["lora_A.weight"].flatten(1)
        return (added * self._change.scaling).reshape(self.shape)


def _fit(shape: tuple[int, ...], parts: Mapping[str, TensorInfo]) -> bool:
    """Whether a change fits a tensor of this shape."""
    sizes = {name: info.shape for name, info in parts.items()}
    if "lora_B.bias" in sizes:
        return sizes["lora_B.bias"] == shape
    embedding = "lora_embedding_A" in sizes
    rows, columns = shape[0], math.prod(shape[1:])
    if embedding:
        rows, columns = columns, rows
    first, second = ("lora_embedding_A", "lora_embedding_B") if embedding else tuple(_PARTS)[:2]
    a, b = sizes.get(first, ()), sizes.get(second, ())
    if len(a) < 2 or len(b) < 2 or math.prod(b[2:]) != 1:
        return False
    return (a[0], math.prod(a[1:]), b[0]) == (b[1], columns, rows)


def read_adapter(name: str, folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> Adapter:
    """The changes that the adapter in `folder` makes to a tower of these tensors.

    Raises CheckpointError for one that changes nothing of the tower, and for kinds of adapters
    whose merging is not known here, by their names.
    """
    config = read_json(folder / ADAPTER_CONFIG)
    if (kind := config.get("peft_type")) != "LORA":
        raise CheckpointError(f"{name}: peft_type {kind!r} is not supported; LORA is")
    weights = folder / ADAPTER_WEIGHTS
    if not weights.is_file():
        raise CheckpointError(f"{name}: holds no {ADAPTER_WEIGHTS}; only safetensors are read")
    parts: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    for key, info in read_header(weights).items():
        full_name, part = _target(key)
        parts[full_name][part] = info
    found = prefixes(parts, shapes)
    if len(found) > 1:
        raise CheckpointError(
            f"{name}: its tensors are those of more than one tower, under "
            + " and ".join(map(repr, sorted(found)))
        )
    if not found:
        some = sorted({target.rpartition(".")[0] for target in parts})
        raise CheckpointError(
            f"{name}: touches nothing of the vision tower, whose features are those of the base "
            f"alone; it adapts {', '.join(some[:3])}{' and others' if len(some) > 3 else ''}"
        )
    ((prefix, own),) = found.items()
    _check_config(name, config)
    unknown = sorted(
        info.full_name
        for target, each in parts.items()
        for part, info in each.items()
        if target.startswith(prefix)
        and (target.removeprefix(prefix) not in shapes or info.dtype not in FLOAT_DTYPES)
    )
    if unknown:
        raise CheckpointError(
            f"{name}: the adapter holds what is not known of a tower: {', '.join(unknown[:5])}"
        )
    logger.info("%s: changes %s of the tower", name, counted(len(own), "tensor"))
    return Adapter(
        name, {each: Change(parts[prefix + each], _scaling(prefix + each, config)) for each in own}
    )


def _target(key: str) -> tuple[str, str]:
    """The tensor that a tensor of an adapter changes, and which part of the change it is."""
    key = key.removeprefix("base_model.model.")
    if found := _PART.fullmatch(key):
        return f"{found[1]}.{_PARTS[found[2]]}", found[2]
    return key.replace(".base_layer.", "."), _WHOLE


def _check_config(name: str, config: Mapping[str, Any]) -> None:
    kinds = [f"{key} {config[key]!r}" for key in _UNSUPPORTED if config.get(key)]
    init = config.get("init_lora_weights", True)
    if init not in _PLAIN_INITS:
        kinds.append(f"init_lora_weights {init!r} (which changes the base; PEFT can convert it)")
    if kinds:
        raise CheckpointError(f"{name}: this kind of LoRA is not supported: {', '.join(kinds)}")


def _scaling(target: str, config: Mapping[str, Any]) -> float:
    """What B A is multiplied by, for a tensor of a module: PEFT looks patterns up by its name."""
    module = target.rpartition(".")[0]
    rank = _by_pattern(module, config.get("rank_pattern"), config.get("r", 8))
    alpha = _by_pattern(module, config.get("alpha_pattern"), config.get("lora_alpha", 8))
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _by_pattern(module: str, patterns: Mapping[str, Any] | None, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
