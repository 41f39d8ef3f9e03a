"""What the attention kernels are given beside qkv: segments, their tiles, and rotary positions.

Shapes: T patches, S segments, C tiles, Dh head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

TILE_ROWS = 128  # query rows of one entry of `Segments.tiles`


@dataclass(frozen=True, slots=True)
class ScheduleTensors:
    """A backend's schedule of a batch on the device; only that backend knows what it says."""

    work: Tensor  # int32 [n]
    per_segment: Tensor  # int32 [S], zero for segments that are not in use


@dataclass(frozen=True, slots=True)
class Segments:
    """Boundaries of the segments that attend only to themselves.

    The device tensors may have room for more than is used (CUDA graphs): `cu_seqlens` then repeats
    its last value, and the counts say how many entries are real. `lengths` and `max_seqlen` live on
    the host.
    """

    cu_seqlens: Tensor  # int32 [S + 1], first 0
    count: Tensor  # int32 [1], segments in use
    tiles: Tensor | None  # int32 [C, 3]: query row, segment start and end; None for windows
    tile_count: Tensor | None  # int32 [1], tiles in use
    lengths: tuple[int, ...]  # S lengths in use, in order
    max_seqlen: int  # an upper bound of `lengths`; a graph's own bound while one is recorded
    schedule: ScheduleTensors | None = None  # only for the backend that made it


@dataclass(frozen=True, slots=True)
class Rotary:
    """Rotary positions of every patch and the float32 table they index, which is never rounded."""

    positions: Tensor  # int32 [T, 2]: row, column
    cos: Tensor  # float32 [positions, Dh / 4]
    sin: Tensor  # float32 [positions, Dh / 4]
    valid: Tensor | None = None  # int32 [1]: rows past it are padding; None where there is none


def tile_list(cu_seqlens: NDArray[np.int32]) -> NDArray[np.int32]:
    """The work list of `Segments.tiles`: int32 [C, 3], (query row, segment start, segment end).

    `cu_seqlens` [S + 1] on the host. Segments that are longest come first: their tiles take the
    most time, and a list that ends with short ones keeps all processors busy to the end.
    """
    bounds = np.asarray(cu_seqlens, dtype=np.int64)
    starts, ends = bounds[:-1], bounds[1:]
    order = np.argsort(starts - ends, kind="stable")
    starts, ends = starts[order], ends[order]
    counts = -(-(ends - starts) // TILE_ROWS)
    first = np.cumsum(counts) - counts  # of each segment's tiles in the list
    within = np.arange(counts.sum()) - np.repeat(first, counts)
    tiles = np.empty((len(within), 3), dtype=np.int32)
    tiles[:, 0] = np.repeat(starts, counts) + within * TILE_ROWS
    tiles[:, 1] = np.repeat(starts, counts)
    tiles[:, 2] = np.repeat(ends, counts)
    return tiles
