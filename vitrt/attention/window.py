"""Our Triton kernel for windows of at most 64 patches: RoPE inside, one read and one write."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vitrt.attention.base import BackendSpec, attention_shape
from vitrt.attention.probe import no_kernel
from vitrt.kernels.segments import Rotary, Segments


class RotatingBackend:
    """One launch of a kernel of ours over the segments; q and k are rotated on the way."""

    capturable = True
    applies_rotary = True

    def __init__(
        self, name: str, attend: Callable[[Tensor, Segments, Rotary, Tensor], Tensor]
    ) -> None:
        """`attend`: (qkv, segments, rotary, out) -> out."""
        self.name = name
        self._attend = attend

    def __call__(
        self, qkv: Tensor, segments: Segments, rotary: Rotary, out: Tensor | None = None
    ) -> Tensor:
        if out is None:
            out = qkv.new_empty(attention_shape(qkv))
        return self._attend(qkv, segments, rotary, out)


def _load(device: torch.device, dtype: torch.dtype, head_dim: int) -> RotatingBackend:
    from vitrt.kernels.window_attention import window_attention

    return RotatingBackend("window", window_attention)


SPEC = BackendSpec("window", _load, no_kernel, windows_only=True, most_window=64)
