"""A tower on the weights of a module that is already loaded, sharing its memory where it can."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from vitrt.config import VisionConfig
from vitrt.engine.loader import load_tower
from vitrt.models.tower import VisionTower


@dataclass(frozen=True, slots=True)
class SharedWeights:
    """Which tensors a tower took over, and which it had to copy into another layout."""

    shared: tuple[str, ...]  # the loaded module's own memory
    copied: Mapping[str, int]  # bytes of the tensor as loaded; interleaved or padded in the tower
    added_bytes: int  # memory that the copies take, padding included


def share_weights(
    config: VisionConfig, loaded: Mapping[str, Tensor]
) -> tuple[VisionTower, SharedWeights]:
    """The tower of `config` on `loaded`: its tensors by their checkpoint names, all on one device.

    Raises ValueError listing every name that is missing, left over or has another shape.
    """
    first = next(iter(loaded.values()))
    tower = load_tower(config, loaded.items(), device=first.device, dtype=first.dtype, share=True)
    theirs = {tensor.data_ptr() for tensor in loaded.values()}
    ours = {parameter.data_ptr() for parameter in tower.parameters()}
    shared = tuple(name for name, tensor in loaded.items() if tensor.data_ptr() in ours)
    copied = {name: tensor.nbytes for name, tensor in loaded.items() if name not in set(shared)}
    added = sum(p.nbytes for p in tower.parameters() if p.data_ptr() not in theirs)
    return tower, SharedWeights(shared, copied, added)
