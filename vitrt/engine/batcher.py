"""Many images of any size -> batches under a token budget. Integers only."""

from __future__ import annotations

from collections.abc import Sequence


def pack(token_counts: Sequence[int], budget: int) -> list[list[int]]:
    """Cut images into consecutive batches whose token counts add up to at most `budget`.

    The indices of all batches, read one after the other, are 0, 1, 2, ...: results come out in
    input order and a stream needs no more than one batch of look-ahead. An image over the budget
    is a batch of its own.

    Args:
        token_counts: tokens (or patches) of each image.
        budget: most tokens a batch, in the same unit.

    Returns:
        The batches, each a list of indices into `token_counts`; none is empty.

    Raises:
        ValueError: `budget` or a count is below 1.
    """
    if budget < 1:
        raise ValueError(f"the token budget is {budget}; it must be at least 1")
    batches: list[list[int]] = []
    room = 0
    for index, count in enumerate(token_counts):
        if count < 1:
            raise ValueError(f"image {index} has {count} tokens; each must have at least 1")
        if not batches or count > room:
            batches.append([])
            room = budget
        batches[-1].append(index)
        room -= count
    return batches
