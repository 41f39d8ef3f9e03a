"""Our Triton kernel for small images: RoPE inside, any segment, made for few tiles."""

from __future__ import annotations

import torch

from vitrt.attention.base import BackendSpec, KernelBackend
from vitrt.attention.probe import no_kernel
from vitrt.kernels.segments import TILE_ROWS


def _load(device: torch.device, dtype: torch.dtype, head_dim: int) -> KernelBackend:
    from vitrt.kernels.short_attention import short_attention

    return KernelBackend("short", short_attention, applies_rotary=True)


# Windows come without tiles, so each must be one.
SPEC = BackendSpec("short", _load, no_kernel, most_window=TILE_ROWS)
