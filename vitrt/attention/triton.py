"""Our own Triton kernel for full attention (kernels/flash_attention.py)."""

from __future__ import annotations

import torch

from vitrt.attention.base import BackendSpec, KernelBackend
from vitrt.attention.probe import no_kernel
from vitrt.kernels.segments import TILE_ROWS


def _load(device: torch.device, dtype: torch.dtype, head_dim: int) -> KernelBackend:
    from vitrt.kernels.flash_attention import flash_attention

    return KernelBackend(
        "triton",
        lambda qkv, segments, rotary, out: flash_attention(qkv, segments, out),
        applies_rotary=False,
    )


# Windows come without tiles, so each must be one.
SPEC = BackendSpec("triton", _load, no_kernel, most_window=TILE_ROWS)
