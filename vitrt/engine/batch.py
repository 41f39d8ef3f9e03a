"""What goes into a forward: patches already cut, or uint8 pixels to cut them from.

Shapes: T patches, P values of one patch.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from vitrt.config import VisionConfig
from vitrt.engine.upload import PixelUploader
from vitrt.kernels.patchify import patchify
from vitrt.models.packed_plan import Origins
from vitrt.models.plan import ForwardPlan, IntArray


class Batch(Protocol):
    """The patches of some images on their way into a forward.

    `rows` says where each patch comes from; it travels to the device inside the packed plan.
    """

    @property
    def grids(self) -> Sequence[Sequence[int]]:
        """(t, h, w) of every image, in patches."""
        ...

    @property
    def key(self) -> Hashable:
        """Equal keys and grids mean equal `rows`."""
        ...

    def send(self, plan: ForwardPlan, config: VisionConfig, uploader: PixelUploader) -> None:
        """Check the patches against plan and tower, and start to copy them to the device."""
        ...

    def origins(self, plan: ForwardPlan) -> Origins | None:
        """What `rows` holds; None: the patches already lie in the order of execution."""
        ...

    def rows(self, plan: ForwardPlan) -> IntArray | None:
        """int32 [T, columns] on the host, or None where `origins` is None."""
        ...

    def write(self, out: Tensor, rows: Tensor | None, num_patches: int) -> None:
        """Fill the first `num_patches` rows of `out` [T or more, P]; the rest is padding."""
        ...


class PixelValues:
    """`pixel_values` [T, P] of transformers' processors, on any device and in any float dtype."""

    key = "values"

    def __init__(self, pixel_values: Tensor, grid_thw: Tensor | Sequence[Sequence[int]]) -> None:
        """`grid_thw` [images, 3] is in patches. Where the two do not belong together there is a
        ValueError, here or when they are sent.
        """
        if not isinstance(pixel_values, Tensor):
            raise ValueError(
                f"pixel_values is a {type(pixel_values).__name__}; it must be a tensor"
            )
        # Or a graph's static input, which they are copied into, would keep their history.
        self.pixel_values = pixel_values.detach()
        self.grids: Sequence[Sequence[int]] = (
            grid_thw.tolist() if isinstance(grid_thw, Tensor) else grid_thw
        )
        self._check_size()

    def _check_size(self) -> None:
        """Before a plan is made: it takes memory for each patch that the grids claim."""
        try:
            patches = sum(int(t) * int(h) * int(w) for t, h, w in self.grids)
        except (TypeError, ValueError):
            return  # no grids, as whoever makes the plan will say
        shape = tuple(self.pixel_values.shape)
        if shape and patches > shape[0]:
            raise ValueError(
                f"pixel_values has shape {shape}; grid_thw holds {patches} patches, so it must be "
                f"{(patches, *shape[1:])}"
            )

    def send(self, plan: ForwardPlan, config: VisionConfig, uploader: PixelUploader) -> None:
        values, wanted = self.pixel_values, (plan.num_patches, config.patch_dim)
        if tuple(values.shape) != wanted:
            raise ValueError(
                f"pixel_values has shape {tuple(values.shape)}; grid_thw holds {wanted[0]} patches "
                f"of {wanted[1]} values in this model, so it must be {wanted}"
            )
        if not values.is_floating_point():
            raise ValueError(f"pixel_values is {values.dtype}; it must be a floating-point tensor")

    def origins(self, plan: ForwardPlan) -> Origins | None:
        return None if plan.order is None else "order"

    def rows(self, plan: ForwardPlan) -> IntArray | None:
        return plan.patch_order

    def write(self, out: Tensor, rows: Tensor | None, num_patches: int) -> None:
        values = self.pixel_values
        if rows is not None:
            values = values.to(out.device, non_blocking=True)
            values = values.index_select(0, rows[:num_patches, 0])
        out[:num_patches].copy_(values, non_blocking=True)


class PixelBatch:
    """uint8 pixels [F, H, W, 3] of every image, on the host, already resized to its grid.

    They are normalised and cut into patches on the device.
    """

    def __init__(
        self, images: Sequence[np.ndarray], grids: Sequence[tuple[int, int, int]], table: Tensor
    ) -> None:
        """F is 1 for a still; `table` float32 [2, 3, 256] on the device, the normalised levels of
        stills and of clips."""
        self.images = images
        self.grids = grids
        self.key = tuple(len(image) for image in images)
        self.table = table
        self._sent: tuple[Tensor, VisionConfig] | None = None  # all bytes, on the device

    def send(self, plan: ForwardPlan, config: VisionConfig, uploader: PixelUploader) -> None:
        self._sent = uploader.upload(self.images), config

    def origins(self, plan: ForwardPlan) -> Origins | None:
        return "sources"

    def rows(self, plan: ForwardPlan) -> IntArray:
        assert self._sent is not None
        return pixel_sources(plan, self.key, self._sent[1])

    def write(self, out: Tensor, rows: Tensor | None, num_patches: int) -> None:
        assert rows is not None and self._sent is not None
        pixels, config = self._sent
        size, temporal = config.patch_size, config.temporal_patch_size
        patchify(pixels, rows, self.table, size, temporal, out.dtype, out=out)


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
