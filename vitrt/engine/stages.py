"""What is done to an item on its way through a pipeline: functions, so that it knows no image."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch

from vitrt.features import ImageFeatures, join

I = TypeVar("I")  # noqa: E741  an item
J = TypeVar("J")  # an item of another kind


class Prepared(Protocol):
    """An image or clip, ready for the device."""

    @property
    def pixels(self) -> Any:
        """uint8 [F, H, W, 3]; of what is lazy, decoded now, which may raise a ValueError."""
        ...

    @property
    def is_lazy(self) -> bool:
        """Whether it is a clip that is decoded as its `runs` are asked for."""
        ...

    @property
    def shape(self) -> tuple[int, int, int]: ...  # F, H, W
    @property
    def nbytes(self) -> int: ...  # of memory that it takes while it waits
    @property
    def times(self) -> tuple[float, ...] | None: ...  # seconds, of the frames of its grid
    @property
    def grid_thw(self) -> tuple[int, int, int]: ...
    @property
    def num_patches(self) -> int: ...
    def split(self, most_patches: int) -> Sequence[Prepared]:
        """Runs of its frames with at most so many patches each, or of one frame that has more."""
        ...

    def runs(self) -> Generator[Prepared]:
        """All of it; what is lazy in decoded runs of frames, of which the next is decoded ahead.

        Raises a ValueError where one cannot be. To be closed where it is not read to its end.
        """
        ...


@dataclass(frozen=True, slots=True)
class Stages(Generic[I]):
    """How an item becomes features."""

    prepare: Callable[[I], Prepared]  # by several threads; raises what is wrong with the item
    run: Callable[[Sequence[Any]], list[ImageFeatures]]  # a batch, on the device
    max_batch_patches: int  # of one call of `run`
    device: torch.device
    # The features of a clip from those of its runs of frames.
    join: Callable[[Sequence[ImageFeatures]], ImageFeatures] = join

    def preparing(self, prepare: Callable[[J], Prepared]) -> Stages[J]:
        """These stages for other items, which `prepare` makes ready."""
        return Stages(prepare, self.run, self.max_batch_patches, self.device, self.join)
