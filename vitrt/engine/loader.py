"""Fill a tower, every parameter exactly once, from (name, tensor) pairs wherever they come from.

A tensor lies on disk, or in memory on any device. A layer takes only its rank's part of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from vitrt.config import VisionConfig
from vitrt.layers.weights import TensorSlice, WeightTarget
from vitrt.messages import listed
from vitrt.models.families import build_tower
from vitrt.models.tower import VisionTower
from vitrt.parallel.context import SINGLE, ParallelContext


class Tower(Protocol):
    """What can be filled: it names every tensor of a checkpoint's tower, once."""

    def weight_targets(self) -> Iterator[WeightTarget]: ...


def load_tower(
    config: VisionConfig,
    tensors: Iterable[tuple[str, TensorSlice]],
    *,
    device: torch.device,
    dtype: torch.dtype,
    parallel: ParallelContext = SINGLE,
    share: bool = False,
) -> VisionTower:
    """The tower of `config` with the weights that `tensors` gives, in any order, ready to run.

    Args:
        tensors: every tensor of the tower by its name in it, each whole, also where `parallel`
            splits it over ranks. They are taken one at a time, unless they are to be shared.
        device, dtype: of the tower.
        share: use the memory of tensors on `device` in `dtype` that the tower lays out as they are.

    Raises ValueError listing every name that is missing, left over, given twice or of another
    shape.
    """
    with torch.device("meta"):
        tower = build_tower(config, parallel)
    shared: dict[int, Tensor] = {}  # by the parameter that takes it over
    if share:
        given = list(tensors)
        by_name = dict(given)
        for target in tower.weight_targets():
            tensor = by_name.get(target.name)
            if (
                target.identical is not None
                and isinstance(tensor, Tensor)
                and (tensor.device, tensor.dtype) == (device, dtype)
                and tuple(tensor.shape) == target.shape
                and tensor.is_contiguous()
            ):
                shared[id(target.identical)] = tensor.detach()
        tensors = given

    def memory(meta: nn.Parameter) -> Tensor:
        if id(meta) in shared:
            return shared[id(meta)].view(meta.shape)
        return torch.empty(meta.shape, dtype=dtype, device=device)

    tower.allocate(memory)
    fill_tower(tower, tensors)
    tower.compile_kernels()
    return tower.eval()


def fill_tower(tower: Tower, tensors: Iterable[tuple[str, TensorSlice]]) -> None:
    """Store `tensors` in the parameters of `tower`; ValueError as in `load_tower`."""
    filling = TowerFilling(tower)
    for name, tensor in tensors:
        filling.store(name, tensor)
    filling.finish()


class TowerFilling:
    """A tower that is being filled with tensors, one after the other, as they come."""

    def __init__(self, tower: Tower) -> None:
        self._targets = {target.name: target for target in tower.weight_targets()}
        self._filled: set[str] = set()
        self._problems: dict[str, list[str]] = {
            "left over": [],
            "given twice": [],
            "wrong shape": [],
        }

    def store(self, name: str, tensor: TensorSlice) -> None:
        """Copy the tensor into the tower, or keep for `finish` why that cannot be."""
        target = self._targets.get(name)
        if target is None:
            self._problems["left over"].append(name)
        elif name in self._filled:
            self._problems["given twice"].append(name)
        else:
            self._filled.add(name)
            if tuple(tensor.shape) != target.shape:
                self._problems["wrong shape"].append(
                    f"{name} is {list(tensor.shape)}, should be {list(target.shape)}"
                )
            elif not _is_there(tensor, target):
                with torch.no_grad():
                    target.store(tensor)

    def finish(self, *, whole: bool = True) -> None:
        """ValueError as in `load_tower`; without `whole`, tensors may be missing."""
        missing = [name for name in self._targets if name not in self._filled] if whole else []
        if lines := listed({"missing": missing, **self._problems}):
            raise ValueError(f"the tower's weights are not those of its config{lines}")


def _is_there(tensor: TensorSlice, target: WeightTarget) -> bool:
    """Whether the parameter is in the tensor's own memory."""
    own = target.identical
    return (
        own is not None and isinstance(tensor, Tensor) and own.data_ptr() == tensor.data_ptr() != 0
    )
