"""Which query rows to take from a backend that works in large tiles, so that it saves a wave.

Blocks of (tile of query rows, head) run in waves, one block on each processor. A last wave of a few
blocks takes as long as a full one, and some of its tiles hold few rows: without those tiles the
wave is gone, and kernels/rest_attention.py computes their rows in a fraction of it.

Shapes: S segments, R entries of the work list.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from vitrt.attention.base import REST_ROWS, AttentionBackend

MOST_RESTS = 4  # entries of a work list, of REST_ROWS rows each: bounds the kernel's scratch memory

# Of many segments the waves drift apart, and there is no last one to save.
_MOST_SEGMENTS = 4
# Attention over fewer keys has waves as short as the two launches that would save one.
_FEWEST_KEYS = 1024
# For the same number of rows the rests' kernel may take this many times as long as the backend.
_COST = 4


@runtime_checkable
class CuttingBackend(Protocol):
    """A backend that heeds `Segments.cut`, and says where it gains by one."""

    def whole_rows(self, lengths: Sequence[int], heads: int) -> NDArray[np.int32] | None:
        """What it wants in `QueryCut.whole` for segments of these lengths; None: no cut."""
        ...


def whole_rows(
    backend: AttentionBackend, lengths: Sequence[int], heads: int
) -> NDArray[np.int32] | None:
    """int32 [S], the query rows that `backend` is to compute of each segment; None: all of them.

    `heads` are those of this rank.
    """
    return backend.whole_rows(lengths, heads) if isinstance(backend, CuttingBackend) else None


def cut_last_wave(
    lengths: Sequence[int], heads: int, *, tile_rows: int, processors: int
) -> NDArray[np.int32] | None:
    """int32 [S], the query rows to keep of each segment, where that saves a wave; else None.

    Cuts the fewest and smallest rests that make the number of waves fall.
    """
    if len(lengths) > _MOST_SEGMENTS or max(lengths) < _FEWEST_KEYS:
        return None
    tiles = sum(-(-length // tile_rows) for length in lengths)
    in_last_wave = (tiles * heads - 1) % processors + 1
    spare = -(-in_last_wave // heads)  # tiles whose blocks, one a head, are the last wave
    rests = sorted(
        (length % tile_rows, index)
        for index, length in enumerate(lengths)
        if length >= _FEWEST_KEYS and length % tile_rows
    )[:spare]
    rows = sum(rest for rest, _ in rests)
    entries = sum(-(-rest // REST_ROWS) for rest, _ in rests)
    if len(rests) < spare or entries > MOST_RESTS:
        return None
    if rows * heads * _COST >= tile_rows * processors:
        return None
    whole = np.array(lengths, dtype=np.int32)
    for rest, index in rests:
        whole[index] -= rest
    return whole


def rest_list(cu_seqlens: NDArray[np.int32], whole: NDArray[np.int32]) -> NDArray[np.int32]:
    """The work list of `QueryCut.rests`: int32 [R, 3], (query row, segment start, segment end).

    Takes `cu_seqlens` [S + 1] and `whole` [S].
    """
    rests = [
        (first, start, end)
        for start, end, rows in zip(cu_seqlens[:-1], cu_seqlens[1:], whole, strict=True)
        for first in range(start + rows, end, REST_ROWS)
    ]
    return np.array(rests, dtype=np.int32).reshape(-1, 3)
