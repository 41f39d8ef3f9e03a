"""Our Triton kernel for windows of at most 64 patches: RoPE inside, one read and one write."""

from __future__ import annotations

import torch

from vitrt.attention.base import BackendSpec, KernelBackend
from vitrt.attention.probe import no_kernel


def _load(device: torch.device, dtype: torch.dtype, head_dim: int) -> KernelBackend:
    from vitrt.kernels.window_attention import window_attention

    return KernelBackend("window", window_attention, applies_rotary=True)


SPEC = BackendSpec("window", _load, no_kernel, windows_only=True, most_window=64)
