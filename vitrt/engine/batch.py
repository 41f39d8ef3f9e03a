"""How patches reach a forward, in its order: from pixel values already cut, or from uint8 pixels.

Shapes: T patches, P values of one patch.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from vitrt.config import VisionConfig
from vitrt.kernels.patchify import patchify
from vitrt.models.packed_plan import Feed
from vitrt.models.plan import ForwardPlan, IntArray


class PatchFeed(Protocol):
    """Writes the patches of one batch; `rows` travels to the device inside the packed plan."""

    kind: Feed | None  # None: the patches already lie in the order of execution

    @property
    def key(self) -> Hashable:
        """Equal keys and grids mean equal `rows`."""
        ...

    def rows(self, plan: ForwardPlan) -> IntArray | None:
        """int32 [T, columns] on the host, or None where `kind` is None."""
        ...

    def write(self, out: Tensor, rows: Tensor | None, num_patches: int) -> None:
        """Fill the first `num_patches` rows of `out` [T or more, P]; the rest is padding."""
        ...


class ValuesFeed:
    """`pixel_values` [T, P] of transformers' processors, on any device and in any float dtype."""

    key = "values"

    def __init__(self, pixel_values: Tensor, *, reordered: bool) -> None:
        # Or a graph's static input, which they are copied into, would keep their history.
        self.pixel_values = pixel_values.detach()
        self.kind: Feed | None = "order" if reordered else None

    def rows(self, plan: ForwardPlan) -> IntArray | None:
        return plan.patch_order

    def write(self, out: Tensor, rows: Tensor | None, num_patches: int) -> None:
        values = self.pixel_values
        if rows is not None:
            values = values.to(out.device, non_blocking=True)
            values = values.index_select(0, rows[:num_patches, 0])
        out[:num_patches].copy_(values, non_blocking=True)


class PixelsFeed:
    """uint8 pixels [F, H, W, 3] of every image, one after the other in one buffer on the device."""

    kind: Feed | None = "sources"

    def __init__(
        self, pixels: Tensor, frames: Sequence[int], table: Tensor, config: VisionConfig
    ) -> None:
        """`frames[i]` is F of image i, 1 for a still; `table` [3, 256] its normalised levels."""
        self.pixels = pixels
        self.key = self.frames = tuple(frames)
        self.table = table
        self.config = config

    def rows(self, plan: ForwardPlan) -> IntArray:
        return pixel_sources(plan, self.frames, self.config)

    def write(self, out: Tensor, rows: Tensor | None, num_patches: int) -> None:
        assert rows is not None
        size, temporal = self.config.patch_size, self.config.temporal_patch_size
        patchify(self.pixels, rows, self.table, size, temporal, out.dtype, out=out)


def pixel_sources(plan: ForwardPlan, frames: Sequence[int], config: VisionConfig) -> IntArray:
    """Where each patch lies in the pixel buffer, int32 [T, 3].

    The columns: the byte of its first pixel, the bytes of a row of pixels, and the bytes to the
    second frame that it holds (0 in a still, whose only frame it holds twice).
    """
    size, channels = config.patch_size, config.in_channels
    frames_of_segments = []  # a still's or a clip's first frame, row bytes, bytes to the second
    base = 0
    for (t, h, w), count in zip(plan.grids, frames, strict=True):
        row_bytes = w * size * channels
        frame_bytes = h * size * row_bytes
        step = config.temporal_patch_size * frame_bytes
        second = frame_bytes if count > 1 else 0
        frames_of_segments += [(base + index * step, row_bytes, second) for index in range(t)]
        base += count * frame_bytes
    if base > np.iinfo(np.int32).max:
        raise ValueError(
            f"a batch holds {base} bytes of pixels; at most {np.iinfo(np.int32).max} go through at "
            "once: lower max_batch_tokens or max_pixels"
        )
    segments = np.array(frames_of_segments, dtype=np.int32)
    sources = np.repeat(segments, plan.segment_lengths, axis=0)
    row, column = plan.positions.T
    sources[:, 0] += row * (sources[:, 1] * size) + column * (size * channels)
    return sources
