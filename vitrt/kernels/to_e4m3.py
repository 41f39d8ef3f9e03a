"""bfloat16 to float8 (e4m3) under one scale: what a product leaves for the next one to read.

Shapes: M rows, K columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitrt.kernels.dispatch import ceil_div, jit, tl, use_triton

LARGEST = 448.0  # finite value of e4m3
_BLOCK = 4096  # 8 values a thread of 4 warps, four times: 16-byte loads in flight


@jit(do_not_specialize=["size"])
def _cast_kernel(x, out, scale, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    values = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32) * scale
    tl.store(out + offsets, values.to(out.dtype.element_ty), mask=mask)


def _cast_triton(x: Tensor, scale: float) -> Tensor:
    assert x.is_contiguous()
    out = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    size = x.numel()
    _cast_kernel[(max(ceil_div(size, _BLOCK), 1),)](x, out, scale, size, _BLOCK, num_warps=4)
    return out


def to_e4m3_ref(x: Tensor, scale: float) -> Tensor:
    """x times `scale` in float32, saturated, rounded once."""
    return (x.float() * scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def to_e4m3(x: Tensor, scale: float) -> Tensor:
    """x [M, K] times `scale` in e4m3, in new memory. What leaves the range saturates."""
    return _cast_triton(x, scale) if use_triton(x) else to_e4m3_ref(x, scale)
