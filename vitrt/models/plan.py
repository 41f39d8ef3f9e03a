"""Everything about a batch that depends on its grids alone, computed on the host with numpy.

A plan is cheap to keep and to reuse; what goes to the device is one packed int32 buffer
(`PlanLayout`), exact for an eager forward or with room to spare for a CUDA graph that other batches
will replay.

Shapes: T patches, M merged tokens, S segments, C tiles, W windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from vitrt.config import Grid, integer
from vitrt.kernels.segments import tile_list

IntArray = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class FramePlan:
    """A frame of n = h x w patches, in the order the tower runs them; one for all of that size."""

    positions: IntArray  # [n, 2] (row, column)
    window_lengths: IntArray | None  # patches of each window; None without windows
    order: IntArray | None  # [n / merge^2] raster index of each merged token; None: as they are
    taps: IntArray | None  # [n, 4] rows of the position table
    tap_weights: NDArray[np.float32] | None  # [n, 4]

    @property
    def nbytes(self) -> int:
        own = (self.positions, self.window_lengths, self.order, self.taps, self.tap_weights)
        return _nbytes(*own)


@dataclass(frozen=True)
class ForwardPlan:
    """A batch, as host arrays in execution order."""

    grids: tuple[Grid, ...]
    merge_unit: int
    window_patches: int  # the most patches a window can hold; 0 without windows
    positions: IntArray  # [T, 2]
    segments: IntArray  # [S + 1] cumulative patches of the frames
    tiles: IntArray  # [C, 3] work list over `segments`
    windows: IntArray | None  # [W + 1] cumulative patches of the windows
    order: IntArray | None  # [M] merged token of the input at each place of execution
    taps: IntArray | None  # [T, 4]
    tap_weights: NDArray[np.float32] | None  # [T, 4]

    @property
    def num_patches(self) -> int:
        return len(self.positions)

    @cached_property
    def tokens(self) -> tuple[int, ...]:
        """Merged tokens of each image."""
        return tuple(t * h * w // self.merge_unit for t, h, w in self.grids)

    @cached_property
    def segment_lengths(self) -> tuple[int, ...]:
        return tuple(np.diff(self.segments).tolist())

    @cached_property
    def window_lengths(self) -> tuple[int, ...]:
        return () if self.windows is None else tuple(np.diff(self.windows).tolist())

    @cached_property
    def max_seqlen(self) -> int:
        return max(self.segment_lengths)

    @cached_property
    def largest_position(self) -> int:
        return max(max(h, w) for _, h, w in self.grids) - 1

    @cached_property
    def patch_order(self) -> IntArray | None:
        """[T] patch of the input at each place of execution; None where that order is kept."""
        if self.order is None:
            return None
        unit = np.arange(self.merge_unit, dtype=np.int32)
        return (self.order[:, None] * self.merge_unit + unit).reshape(-1)

    @cached_property
    def nbytes(self) -> int:
        own = (self.positions, self.segments, self.tiles, self.windows, self.order, self.taps)
        return _nbytes(*own, self.tap_weights)


def _nbytes(*arrays: np.ndarray | None) -> int:
    return sum(array.nbytes for array in arrays if array is not None)


def check_grids(grid_thw: Sequence[Sequence[int]], merge: int) -> tuple[Grid, ...]:
    """`grid_thw` as plain ints. ValueError names the first grid that no tower can take."""
    try:
        grids = tuple((integer(t), integer(h), integer(w)) for t, h, w in grid_thw)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"grid_thw must be rows of three integers (t, h, w), got {grid_thw!r}: {error}"
        ) from error
    for index, (t, h, w) in enumerate(grids):
        if t < 1 or h < 1 or w < 1 or h % merge or w % merge:
            raise ValueError(
                f"grid_thw[{index}] is ({t}, {h}, {w}); it needs at least one frame, and rows and "
                f"columns that are positive multiples of the merge size {merge}"
            )
    if not grids:
        raise ValueError("grid_thw is empty; a batch needs at least one (t, h, w)")
    return grids


def build_plan(
    grids: tuple[Grid, ...], frames: Sequence[FramePlan], *, merge_unit: int, window_patches: int
) -> ForwardPlan:
    """Join the images: `frames[i]` is one frame of `grids[i]`, repeated for each of its frames."""
    times = [t for t, _, _ in grids]

    def repeated(arrays: list[np.ndarray]) -> np.ndarray:
        if len(arrays) == 1 and times[0] == 1:
            return arrays[0]
        pairs = zip(arrays, times, strict=True)
        return np.concatenate([a for array, t in pairs for a in [array] * t])

    def optional(name: str) -> np.ndarray | None:
        arrays = [getattr(frame, name) for frame in frames]
        return None if arrays[0] is None else repeated(arrays)

    segments = _cumulative(np.repeat([h * w for _, h, w in grids], times))
    window_lengths = optional("window_lengths")
    order = optional("order")
    if order is not None:
        # A frame's order counts from its own first merged token.
        sizes = np.diff(segments) // merge_unit
        order = order + np.repeat(segments[:-1] // merge_unit, sizes)
    return ForwardPlan(
        grids=grids,
        merge_unit=merge_unit,
        window_patches=window_patches,
        positions=repeated([frame.positions for frame in frames]),
        segments=segments,
        tiles=tile_list(segments),
        windows=None if window_lengths is None else _cumulative(window_lengths),
        order=None if order is None else order.astype(np.int32),
        taps=optional("taps"),
        tap_weights=optional("tap_weights"),
    )


def _cumulative(lengths: np.ndarray) -> IntArray:
    out = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=out[1:])
    return out


def window_order(rows: int, columns: int, cells: int) -> tuple[IntArray, IntArray]:
    """Windows of cells x cells merged tokens over one frame of rows x columns of them.

    Returns the raster index of every merged token in window order, and the merged tokens of each
    window. Windows are row-major and cut off at the frame's edges; the empty window that
    transformers adds where the size divides evenly holds nothing and vanishes.
    """
    row, column = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    across = -(-columns // cells)
    window = (row // cells) * across + column // cells
    order = np.argsort(window.reshape(-1), kind="stable").astype(np.int32)
    return order, np.bincount(window.reshape(-1)).astype(np.int32)


def position_taps(
    positions: IntArray, rows: int, columns: int, side: int
) -> tuple[IntArray, NDArray[np.float32]]:
    """The four rows of the side x side position table under every patch, and their weights.

    Bilinear with align_corners: src = i * (side - 1) / max(n - 1, 1) in float32, its floor and the
    next one, clamped to the last. Returns int32 [n, 4] and float32 [n, 4].
    """
    low, high, fraction = [], [], []
    for axis, count in enumerate((rows, columns)):
        index = positions[:, axis].astype(np.float32)
        source = index * np.float32(side - 1) / np.float32(max(count - 1, 1))
        floor = np.floor(source)
        low.append(floor.astype(np.int32))
        high.append(np.minimum(floor.astype(np.int32) + 1, side - 1))
        fraction.append(source - floor)
    (top, left), (bottom, right), (down, across) = low, high, fraction
    taps = [top * side + left, top * side + right, bottom * side + left, bottom * side + right]
    one = np.float32(1)
    weights = [
        (one - down) * (one - across),
        (one - down) * across,
        down * (one - across),
        down * across,
    ]
    return np.stack(taps, axis=1).astype(np.int32), np.stack(weights, axis=1).astype(np.float32)
