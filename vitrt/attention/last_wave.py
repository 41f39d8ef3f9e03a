"""Which query rows to take from a backend that works in large tiles, so that it saves a wave.

Blocks of (tile of query rows, head) run in waves, one block on each processor. A last wave of a few
blocks takes as long as a full one, and some of its tiles hold few rows: without those tiles the
wave is gone, and kernels/tail_attention.py computes their rows in a fraction of it.

Shapes: S segments, R entries of the work list.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from vitrt.attention.base import Schedule
from vitrt.kernels.segments import ScheduleTensors
from vitrt.kernels.tail_attention import TAIL_ROWS, TailRows

MOST_ENTRIES = 4  # of a work list, of TAIL_ROWS rows each: bounds the kernel's scratch memory
_LIST_AT = 4  # int32 values before the list, so that it starts on 16 bytes; the first is its length

# With many segments the waves drift apart, and there is no last one to save.
MOST_SEGMENTS = 4
# Attention over fewer keys has waves as short as the two launches that would save one.
_FEWEST_KEYS = 1024
# For the same number of rows the tail's kernel may take this many times as long as the backend.
_COST = 4


def schedule_last_wave(
    lengths: Sequence[int], heads: int, *, tile_rows: int, processors: int
) -> Schedule | None:
    """The tail rows to leave to their own kernel, where that saves a wave of blocks."""
    if len(lengths) > MOST_SEGMENTS or max(lengths) < _FEWEST_KEYS:
        return None
    return _schedule(tuple(lengths), heads, tile_rows, processors)


@lru_cache(maxsize=1024)
def _schedule(
    lengths: tuple[int, ...], heads: int, tile_rows: int, processors: int
) -> Schedule | None:
    whole = rows_in_whole_tiles(lengths, heads, tile_rows=tile_rows, processors=processors)
    if whole is None:
        return None
    entries = tail_list(lengths, whole)
    work = np.zeros(_LIST_AT + 3 * MOST_ENTRIES, dtype=np.int32)
    work[0] = len(entries)
    work[_LIST_AT : _LIST_AT + entries.size] = entries.reshape(-1)
    return Schedule("last wave", work, whole)


def tail_rows(schedule: ScheduleTensors) -> TailRows:
    """What the tail's kernel reads, out of such a schedule on the device."""
    return TailRows(schedule.work[_LIST_AT:].view(-1, 3), schedule.work[:1])


def rows_in_whole_tiles(
    lengths: Sequence[int], heads: int, *, tile_rows: int, processors: int
) -> NDArray[np.int32] | None:
    """int32 [S], the query rows to keep of each segment, where that saves a wave; else None.

    Leaves out the fewest and smallest tails that make the number of waves fall.
    """
    tiles = sum(-(-length // tile_rows) for length in lengths)
    in_last_wave = (tiles * heads - 1) % processors + 1
    spare = -(-in_last_wave // heads)  # tiles whose blocks, one a head, are the last wave
    tails = sorted(
        (length % tile_rows, index)
        for index, length in enumerate(lengths)
        if length >= _FEWEST_KEYS and length % tile_rows
    )[:spare]
    rows = sum(tail for tail, _ in tails)
    entries = sum(-(-tail // TAIL_ROWS) for tail, _ in tails)
    if len(tails) < spare or entries > MOST_ENTRIES:
        return None
    if rows * heads * _COST >= tile_rows * processors:
        return None
    whole = np.array(lengths, dtype=np.int32)
    for tail, index in tails:
        whole[index] -= tail
    return whole


def tail_list(lengths: Sequence[int], whole: NDArray[np.int32]) -> NDArray[np.int32]:
    """The rows after the `whole` [S]: int32 [R, 3], (query row, segment start, segment end)."""
    ends = np.cumsum(lengths)
    entries = [
        (first, end - length, end)
        for length, end, rows in zip(lengths, ends, whole, strict=True)
        for first in range(end - length + rows, end, TAIL_ROWS)
    ]
    return np.array(entries, dtype=np.int32).reshape(-1, 3)
