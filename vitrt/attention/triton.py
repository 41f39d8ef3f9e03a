"""Our own Triton kernel for full attention (kernels/flash_attention.py)."""

from __future__ import annotations

from torch import Tensor

from vitrt.attention.base import BackendSpec, attention_shape
from vitrt.attention.probe import no_kernel
from vitrt.kernels.segments import TILE_ROWS, Rotary, Segments


class TritonBackend:
    """One persistent launch over `Segments.tiles`, or over the segments where there are none."""

    name = "triton"
    capturable = True
    applies_rotary = False

    def __init__(self) -> None:
        from vitrt.kernels.flash_attention import flash_attention

        self._attend = flash_attention

    def __call__(
        self, qkv: Tensor, segments: Segments, rotary: Rotary, out: Tensor | None = None
    ) -> Tensor:
        if out is None:
            out = qkv.new_empty(attention_shape(qkv))
        return self._attend(qkv, segments, out)


# Windows come without tiles, so each must be one.
SPEC = BackendSpec("triton", lambda *_: TritonBackend(), no_kernel, most_window=TILE_ROWS)
