"""Our Triton kernel for windows of at most 64 patches: RoPE inside, one read and one write."""

from __future__ import annotations

from torch import Tensor

from vitrt.attention.base import BackendSpec, attention_shape
from vitrt.attention.probe import no_kernel
from vitrt.kernels.segments import Rotary, Segments


class WindowBackend:
    """One launch over the windows; q and k are rotated on the way."""

    name = "window"
    capturable = True
    applies_rotary = True

    def __init__(self) -> None:
        from vitrt.kernels.window_attention import window_attention

        self._attend = window_attention

    def __call__(
        self, qkv: Tensor, segments: Segments, rotary: Rotary, out: Tensor | None = None
    ) -> Tensor:
        if out is None:
            out = qkv.new_empty(attention_shape(qkv))
        return self._attend(qkv, segments, rotary, out)


SPEC = BackendSpec(
    "window", lambda *_: WindowBackend(), no_kernel, windows_only=True, most_window=64
)
