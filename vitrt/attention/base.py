"""What an attention backend is given and what it must say about itself.

Shapes: T patches, S segments, H heads, Dh head size.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitrt.kernels.segments import Rotary, Segments


@dataclass(frozen=True, slots=True, eq=False)
class Schedule:
    """How a backend wants to process one batch, in its own terms: nobody else reads the arrays.

    They travel to the device inside the packed plan and come back in `Segments.schedule`, so that a
    recorded graph serves every batch whose schedule has the same key.
    """

    key: Hashable  # what a recording cannot change
    work: NDArray[np.int32]  # [n], n the same for all batches of one key
    per_segment: NDArray[np.int32]  # [S]


class AttentionBackend(Protocol):
    """Non-causal variable-length self-attention over packed segments."""

    name: str
    capturable: bool  # may be recorded into a CUDA graph
    applies_rotary: bool  # rotates q and k itself; otherwise they arrive rotated

    def __call__(
        self, qkv: Tensor, segments: Segments, rotary: Rotary, out: Tensor | None = None
    ) -> Tensor:
        """Attend within each segment, scaled by Dh ** -0.5.

        qkv [T, 3, H, Dh], contiguous. Returns [T, H * Dh] in `out` where it is given. Rows outside
        every segment are left unwritten.
        """
        ...


class KernelBackend:
    """A kernel of ours: one launch over the segments."""

    capturable = True

    def __init__(
        self,
        name: str,
        attend: Callable[[Tensor, Segments, Rotary, Tensor], Tensor],
        *,
        applies_rotary: bool,
    ) -> None:
        """`attend`: (qkv, segments, rotary, out) -> out."""
        self.name = name
        self.applies_rotary = applies_rotary
        self._attend = attend

    def __call__(
        self, qkv: Tensor, segments: Segments, rotary: Rotary, out: Tensor | None = None
    ) -> Tensor:
        if out is None:
            out = qkv.new_empty(attention_shape(qkv))
        return self._attend(qkv, segments, rotary, out)


@runtime_checkable
class SchedulingBackend(Protocol):
    """A backend that gains by planning some batches."""

    def schedule(self, lengths: Sequence[int], heads: int) -> Schedule | None:
        """Its plan for segments of these lengths and this rank's heads; None: it needs none."""
        ...


@dataclass(frozen=True, slots=True)
class BackendSpec:
    """A registry entry: what it takes to know whether a backend can run, without importing it.

    Both callables are asked with (device, dtype, head size).
    """

    name: str
    load: Callable[[torch.device, torch.dtype, int], AttentionBackend]
    # None, or why it cannot run
    unavailable: Callable[[torch.device, torch.dtype, int], str | None]
    windows_only: bool = False  # made for short segments: never used for full-attention layers
    most_window: int | None = None  # patches of the largest window it takes; None: of any size

    def window_limit(self, patches: int) -> str | None:
        """None where windows of up to so many patches (0: none) go through it, else the reason."""
        if self.most_window is None or patches <= self.most_window:
            return None
        return (
            f"takes windows of at most {self.most_window} patches, and this tower's have up to "
            f"{patches}"
        )


def attention_shape(qkv: Tensor) -> torch.Size:
    """[T, H * Dh], the shape of what attention over `qkv` returns."""
    return torch.Size((qkv.shape[0], qkv.shape[2] * qkv.shape[3]))
