"""Our Triton kernel for small images: RoPE inside, any segment, made for few tiles."""

from __future__ import annotations

import torch

from vitrt.attention.base import BackendSpec
from vitrt.attention.probe import no_kernel
from vitrt.attention.window import RotatingBackend
from vitrt.kernels.segments import TILE_ROWS


def _load(device: torch.device, dtype: torch.dtype, head_dim: int) -> RotatingBackend:
    from vitrt.kernels.short_attention import short_attention

    return RotatingBackend("short", short_attention)


# Windows come without tiles, so each must be one.
SPEC = BackendSpec("short", _load, no_kernel, most_window=TILE_ROWS)
