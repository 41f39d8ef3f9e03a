"""Our Triton kernel for small images: RoPE inside, any segment, made for few tiles."""

from __future__ import annotations

from torch import Tensor

from vitrt.attention.base import BackendSpec, attention_shape
from vitrt.attention.probe import no_kernel
from vitrt.kernels.segments import TILE_ROWS, Rotary, Segments


class ShortBackend:
    """One launch over `Segments.tiles`, or over the segments where there are none."""

    name = "short"
    capturable = True
    applies_rotary = True

    def __init__(self) -> None:
        from vitrt.kernels.short_attention import short_attention

        self._attend = short_attention

    def __call__(
        self, qkv: Tensor, segments: Segments, rotary: Rotary, out: Tensor | None = None
    ) -> Tensor:
        if out is None:
            out = qkv.new_empty(attention_shape(qkv))
        return self._attend(qkv, segments, rotary, out)


# Windows come without tiles, so each must be one.
SPEC = BackendSpec("short", lambda *_: ShortBackend(), no_kernel, most_window=TILE_ROWS)
