"""The memory that recorded graphs read their patches and plans from: one for all of them.

Shapes: T patches of a bucket, P values of one patch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitrt.engine.batch import Batch
from vitrt.engine.buckets import Buckets
from vitrt.models.packed_plan import PlanLayout
from vitrt.models.plan import ForwardPlan


class StaticInputs:
    """Made when they are first used, for the largest bucket; smaller ones use their front."""

    def __init__(self, buckets: Buckets, device: torch.device, dtype: torch.dtype) -> None:
        self._buckets = buckets
        self._device = device
        self._dtype = dtype
        self._patches: Tensor | None = None
        self._plan: Tensor | None = None
        self._loaded: Tensor | None = None  # the packed plan that lies in the buffer
        self._stream: torch.cuda.Stream | None = None  # that used them last

    def of(self, bucket: int) -> tuple[Tensor, Tensor]:
        """Patches [T, P], and an int32 buffer for any plan."""
        if self._patches is None or self._plan is None:
            shape = self._buckets.largest, self._buckets.tower.config.patch_dim
            size = self._buckets.plan_values()
            with torch.inference_mode(False):  # else only callers inside it could write them
                self._patches = torch.zeros(shape, dtype=self._dtype, device=self._device)
                self._plan = torch.zeros(size, dtype=torch.int32, device=self._device)
        return self._patches[:bucket], self._plan

    def load(
        self,
        bucket: int,
        packed: Tensor,
        layout: PlanLayout,
        plan: ForwardPlan,
        batch: Batch | None,
    ) -> tuple[Tensor, Tensor]:
        """Copy a packed plan of this layout, and the patches of its batch; returns `of(bucket)`."""
        patches, buffer = self.of(bucket)
        if self._device.type == "cuda":
            self.take_turns(torch.cuda.current_stream(self._device))
        if packed is not self._loaded:  # neither is written to: a grid that comes again is there
            buffer[: packed.numel()].copy_(packed, non_blocking=True)
            self._loaded = packed
        if batch is not None:
            rows = None if layout.origins is None else layout.view(buffer, "origins")
            batch.write(patches, rows, plan.num_patches)
        return patches, buffer

    def take_turns(self, stream: torch.cuda.Stream) -> None:
        """Let `stream` wait for the last caller's: the runner's lock is released when a replay is
        launched, not when it has read the static inputs.
        """
        if self._stream is not None and self._stream != stream:
            stream.wait_stream(self._stream)
        self._stream = stream
