"""A plan on the device: one packed int32 buffer, and named views into it.

Shapes: T patches, M merged tokens, S segments, C tiles, W windows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from math import prod
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from vitrt.attention import Schedule
from vitrt.kernels.segments import TILE_ROWS, ScheduleTensors, Segments
from vitrt.models.plan import ForwardPlan

# What says where the patches come from, in the order of execution; see vitrt/engine/batch.py.
Origins = Literal["order", "sources"]
_ORIGIN_COLUMNS: dict[Origins, int] = {"order": 1, "sources": 3}
_COUNTS = 4  # patches, segments, tiles, windows in use
# int32 values: every field starts on 16 bytes, so that kernels may load it in wide words.
_ALIGNMENT = 4
_SEGMENT_PATCHES = 16  # patches of a bucket to each segment, or window, that it has room for
_FEWEST_SEGMENTS = 8

Buffer = TypeVar("Buffer", Tensor, np.ndarray)


@dataclass(frozen=True, slots=True)
class PlanLayout:
    """How many of each a packed plan has room for; where its fields lie follows from that alone."""

    patches: int
    segments: int
    tiles: int
    windows: int | None  # None: a tower without windows
    merge_unit: int
    taps: bool  # a tower with a position table
    max_seqlen: int  # bounds the segments for as long as the views are used
    schedule: int | None = None  # values of the attention backend's own; None: it has no schedule
    origins: Origins | None = None  # last in the buffer: a graph's fields lie the same without it

    @classmethod
    def exact(cls, plan: ForwardPlan) -> PlanLayout:
        windows = None if plan.windows is None else len(plan.windows) - 1
        return cls(
            patches=plan.num_patches,
            segments=len(plan.segments) - 1,
            tiles=len(plan.tiles),
            windows=windows,
            merge_unit=plan.merge_unit,
            taps=plan.taps is not None,
            max_seqlen=plan.max_seqlen,
        )

    @classmethod
    def bucket(cls, plan: ForwardPlan, patches: int, segments: int) -> PlanLayout:
        """Room for any batch of `plan`'s tower with at most so many patches and segments."""
        return cls(
            patches,
            segments,
            tiles=patches // TILE_ROWS + segments,  # a segment's last tile may not be full
            windows=None if plan.windows is None else most_segments(patches),
            merge_unit=plan.merge_unit,
            taps=plan.taps is not None,
            max_seqlen=patches,
        )

    def fits(self, plan: ForwardPlan) -> bool:
        need = PlanLayout.exact(plan)
        return (
            need.patches <= self.patches
            and need.segments <= self.segments
            and (need.windows or 0) <= (self.windows or 0)
        )

    def scheduled(self, schedule: Schedule | None) -> PlanLayout:
        """The same layout with room for a schedule of this key."""
        return replace(self, schedule=None if schedule is None else len(schedule.work))

    def with_origins(self, origins: Origins | None) -> PlanLayout:
        """The same layout with room for the origins of its patches."""
        return replace(self, origins=origins)

    def fields(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Name -> (offset in int32 values, shape)."""
        return _fields(self)

    def view(self, buffer: Buffer, name: str) -> Buffer:
        """A field of a packed plan in its shape."""
        offset, shape = self.fields()[name]
        return buffer[offset : offset + prod(shape)].reshape(shape)

    @property
    def size(self) -> int:
        """int32 values of the whole buffer."""
        offset, shape = list(self.fields().values())[-1]
        return offset + prod(shape)


def most_segments(patches: int) -> int:
    """The most segments, or windows, that a bucket of so many patches has room for."""
    return max(patches // _SEGMENT_PATCHES, _FEWEST_SEGMENTS)


@lru_cache(maxsize=1024)
def _fields(layout: PlanLayout) -> dict[str, tuple[int, tuple[int, ...]]]:
    fields: dict[str, tuple[int, tuple[int, ...]]] = {}
    offset = 0
    for name, shape in _shapes(layout):
        fields[name] = (offset, shape)
        offset += -(-prod(shape) // _ALIGNMENT) * _ALIGNMENT
    return fields


def _shapes(layout: PlanLayout) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "counts", (_COUNTS,)
    yield "positions", (layout.patches, 2)
    yield "segments", (layout.segments + 1,)
    yield "tiles", (layout.tiles, 3)
    if layout.schedule is not None:
        yield "schedule", (layout.schedule,)
        yield "per_segment", (layout.segments,)
    if layout.windows is not None:
        yield "windows", (layout.windows + 1,)
        yield "inverse", (layout.patches // layout.merge_unit,)
    if layout.taps:
        yield "taps", (layout.patches, 4)
        yield "tap_weights", (layout.patches, 4)
    if layout.origins is not None:
        yield "origins", (layout.patches, _ORIGIN_COLUMNS[layout.origins])


def pack_plan(
    plan: ForwardPlan,
    layout: PlanLayout,
    *,
    origins: np.ndarray | None,
    pinned: bool,
    schedule: Schedule | None = None,
) -> Tensor:
    """The plan's arrays at the layout's offsets, int32 [layout.size] on the host.

    `origins` [T, columns] goes with `layout.origins`, `schedule` with `layout.schedule`. What is
    left over is inert: boundaries repeat their last value, positions, taps and the schedule's
    values are 0, origins are -1, and the order of padded tokens maps each to itself.
    """
    buffer = torch.zeros(layout.size, dtype=torch.int32, device="cpu", pin_memory=pinned)
    field = partial(layout.view, buffer.numpy())
    windows = 0 if plan.windows is None else len(plan.windows) - 1
    if schedule is not None:
        field("schedule")[:] = schedule.work
        field("per_segment")[: len(schedule.per_segment)] = schedule.per_segment
    segments = len(plan.segments) - 1
    field("counts")[:] = (plan.num_patches, segments, len(plan.tiles), windows)
    field("positions")[: plan.num_patches] = plan.positions
    _fill_boundaries(field("segments"), plan.segments)
    field("tiles")[: len(plan.tiles)] = plan.tiles
    if plan.windows is not None and plan.order is not None:
        _fill_boundaries(field("windows"), plan.windows)
        inverse = field("inverse")
        inverse[:] = np.arange(len(inverse))
        inverse[plan.order] = np.arange(len(plan.order))
    if plan.taps is not None and plan.tap_weights is not None:
        field("taps")[: plan.num_patches] = plan.taps
        field("tap_weights")[: plan.num_patches] = plan.tap_weights.view(np.int32)
    if origins is not None:
        rows = field("origins")
        rows[: plan.num_patches] = origins.reshape(plan.num_patches, -1)
        rows[plan.num_patches :] = -1
    return buffer


def _fill_boundaries(target: np.ndarray, boundaries: np.ndarray) -> None:
    target[: len(boundaries)] = boundaries
    target[len(boundaries) :] = boundaries[-1]


@dataclass(frozen=True)
class DevicePlan:
    """What a forward reads: tensors on the device and a few bounds on the host."""

    positions: Tensor  # int32 [T, 2]
    valid: Tensor | None  # int32 [1] patches that are no padding; None where none is
    full: Segments
    window: Segments | None
    inverse: Tensor | None  # int32 [M] place of execution of each merged token
    taps: Tensor | None  # int32 [T, 4]
    tap_weights: Tensor | None  # float32 [T, 4]
    origins: Tensor | None  # int32 [T, 1 or 3]
    largest_position: int  # host bound of `positions`

    @cached_property
    def hidden_inverse(self) -> Tensor:
        """[T] place of execution of each patch, for hidden states of a reordered tower."""
        assert self.inverse is not None
        unit = self.positions.shape[0] // self.inverse.shape[0]
        steps = torch.arange(unit, dtype=torch.int32, device=self.inverse.device)
        return (self.inverse[:, None] * unit + steps).reshape(-1)


def view_plan(buffer: Tensor, layout: PlanLayout, plan: ForwardPlan, *, padded: bool) -> DevicePlan:
    """Named views of a packed plan on the device."""
    field = partial(layout.view, buffer)
    counts = field("counts")
    schedule = None
    if layout.schedule is not None:
        schedule = ScheduleTensors(field("schedule"), field("per_segment"))
    full = Segments(
        cu_seqlens=field("segments"),
        count=counts[1:2],
        tiles=field("tiles"),
        tile_count=counts[2:3],
        lengths=plan.segment_lengths,
        max_seqlen=layout.max_seqlen,
        schedule=schedule,
    )
    window = None
    if plan.windows is not None:
        window = Segments(
            cu_seqlens=field("windows"),
            count=counts[3:4],
            tiles=None,
            tile_count=None,
            lengths=plan.window_lengths,
            max_seqlen=plan.window_patches,
        )
    return DevicePlan(
        positions=field("positions"),
        valid=counts[0:1] if padded else None,
        full=full,
        window=window,
        inverse=field("inverse") if layout.windows is not None else None,
        taps=field("taps") if layout.taps else None,
        tap_weights=field("tap_weights").view(torch.float32) if layout.taps else None,
        origins=field("origins") if layout.origins is not None else None,
        largest_position=plan.largest_position,
    )
