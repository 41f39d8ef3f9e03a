"""A tower on the weights of a module that is already loaded, sharing its memory where it can."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitrt.config import VisionConfig
from vitrt.models.families import build_tower
from vitrt.models.tower import VisionTower


@dataclass(frozen=True, slots=True)
class SharedWeights:
    """What a tower took over and what it had to lay out anew, by tensor name."""

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
    with torch.device("meta"):
        tower = build_tower(config)
    slots = {slot.name: slot for slot in tower.weight_targets()}
    _check_names({name: slot.shape for name, slot in slots.items()}, loaded)
    sources = {
        id(slot.identical): loaded[name].detach()
        for name, slot in slots.items()
        if slot.identical is not None and loaded[name].is_contiguous()
    }
    added = 0

    def memory(meta: nn.Parameter) -> Tensor:
        nonlocal added
        source = sources.get(id(meta))
        if source is not None:
            return source.view(meta.shape)
        own = torch.empty(meta.shape, dtype=first.dtype, device=first.device)
        added += own.nbytes
        return own

    tower.place(memory)
    shared = tuple(name for name, slot in slots.items() if id(slot.identical) in sources)
    copied = {name: tensor.nbytes for name, tensor in loaded.items() if name not in set(shared)}
    with torch.no_grad():
        for slot in tower.weight_targets():  # of the parameters that are now there
            if slot.name in copied:
                slot.store(_InMemory(loaded[slot.name].detach()))
    tower.prepare()
    return tower.eval(), SharedWeights(shared, copied, added)


class _InMemory:
    """A loaded tensor where a layer expects one on disk."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def __getitem__(self, index: object) -> Tensor:
        return self.tensor[index]  # type: ignore[index]


def _check_names(wanted: Mapping[str, tuple[int, ...]], loaded: Mapping[str, Tensor]) -> None:
    problems = [f"missing: {name}" for name in wanted if name not in loaded]
    problems += [f"left over: {name}" for name in loaded if name not in wanted]
    problems += [
        f"{name} is {list(loaded[name].shape)}, should be {list(shape)}"
        for name, shape in wanted.items()
        if name in loaded and tuple(loaded[name].shape) != shape
    ]
    if problems:
        raise ValueError("the tower's weights are not those of its config: " + "; ".join(problems))
