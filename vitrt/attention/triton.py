"""Our own Triton kernel for full attention (kernels/flash_attention.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from vitrt.attention.base import AttentionBackend, BackendSpec, attention_shape
from vitrt.attention.probe import HALF_PRECISION, not_triton, wrong_shape
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


def _unavailable(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    return not_triton(device) or wrong_shape(dtype, head_dim, (*HALF_PRECISION, torch.float32), 128)


def _load(device: torch.device, dtype: torch.dtype, head_dim: int) -> AttentionBackend:
    return TritonBackend()


# Windows come without tiles, so each must be one.
SPEC = BackendSpec("triton", _load, _unavailable, most_window=TILE_ROWS)
