"""Where each tensor of a checkpoint goes: a layer names what it needs, and stores its part.

A layer owns its sharding and its padding, so the loader knows neither: it opens a tensor lazily and
hands it to the target of that name, which reads only the rows and columns that this rank keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


class TensorSlice(Protocol):
    """A tensor in memory, or on disk, where indexing reads just that part."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, index: Any) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class WeightTarget:
    """One tensor of a checkpoint and what becomes of it."""

    name: str  # in the checkpoint, without the tower's prefix
    shape: tuple[int, ...]  # of the whole tensor, as saved
    store: Callable[[TensorSlice], None]  # reads this rank's part, casts it, writes it
    # The parameter that is this very tensor, at most reshaped: it may share the memory of one that
    # is already loaded. None where the layout changes or a rank keeps only a part.
    identical: Tensor | None = None


def whole(name: str, target: Tensor, shape: tuple[int, ...] | None = None) -> WeightTarget:
    """Fills `target` with the whole tensor, reshaped from `shape` where it differs."""

    def store(source: TensorSlice) -> None:
        target.copy_(source[...].reshape(target.shape))

    return WeightTarget(name, shape or tuple(target.shape), store, identical=target)


def partly(
    name: str, target: Tensor, shape: tuple[int, ...], store: Callable[[TensorSlice], None]
) -> WeightTarget:
    """Fills `target` by `store` from a tensor of `shape`, of which a rank may keep only a part."""
    return WeightTarget(name, shape, store, target if target.shape == shape else None)
