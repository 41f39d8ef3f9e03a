"""A tower that only keeps what it is filled with."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from vitrt.checkpoint.opened import Checkpoint
from vitrt.layers.weights import TensorSlice, WeightTarget
from vitrt.models.families import build_tower


class Recorder:
    """A tower that keeps every tensor it is given, by name, and counts."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.shapes = shapes
        self.kept: dict[str, torch.Tensor] = {}

    def weight_targets(self) -> Iterator[WeightTarget]:
        for name, shape in self.shapes.items():
            yield WeightTarget(name, shape, lambda source, name=name: self.keep(name, source))

    def keep(self, name: str, source: TensorSlice) -> None:
        assert name not in self.kept, f"{name} stored twice"
        self.kept[name] = source[...]


def recorder(checkpoint: Checkpoint) -> Recorder:
    with torch.device("meta"):
        tower = build_tower(checkpoint.vision_config())
    return Recorder({slot.name: slot.shape for slot in tower.weight_targets()})
