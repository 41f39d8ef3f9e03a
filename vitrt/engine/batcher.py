"""Many images of any size -> batches under a budget of patches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


def pack(images: Iterable[T], budget: int, patches_of: Callable[[T], int]) -> list[list[T]]:
    """Cut images into consecutive batches of at most `budget` patches in all.

    Read one after the other, the batches are the images in their order: results come out in input
    order, and a stream needs no more than one batch of look-ahead. An image over the budget is a
    batch of its own. ValueError for a budget below 1.
    """
    if budget < 1:
        raise ValueError(f"the budget is {budget} patches; it must be at least 1")
    batches: list[list[T]] = []
    room = 0
    for image in images:
        patches = patches_of(image)
        if not batches or patches > room:
            batches.append([])
            room = budget
        batches[-1].append(image)
        room -= patches
    return batches
