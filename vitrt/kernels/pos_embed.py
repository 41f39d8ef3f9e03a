"""Interpolated position embedding: four taps of a learned table, weighted, added to the patch embedding.

Shapes: T patches, D width, N entries of the table.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from vitrt.kernels.dispatch import ceil_div, jit, pow2_ceil, tl, use_triton


@jit(do_not_specialize=["tokens"])
def _position_kernel(
    x,
    table,
    taps,
    weights,
    tokens,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A tile [BLOCK_T, BLOCK_D]: neighbouring patches share most of their taps, so the first-level cache serves them."""
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    mask = (row < tokens) & (column < D)
    at = x + row.to(tl.int64) * D + column
    values = tl.load(at, mask=mask, other=0.0)
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for tap in tl.static_range(4):
        entry = tl.load(taps + 4 * row + tap, mask=row < tokens, other=0)
        weight = tl.load(weights + 4 * row + tap, mask=row < tokens, other=0.0)
        total += weight * tl.load(table + entry * D + column, mask=mask, other=0.0).to(tl.float32)
    # transformers rounds the interpolated embedding before it adds it.
    rounded = total.to(x.dtype.element_ty).to(tl.float32)
    tl.store(at, (values.to(tl.float32) + rounded).to(x.dtype.element_ty), mask=mask)


def _position_triton(
    x: Tensor,
    table: Tensor,
    taps: Tensor,
    weights: Tensor,
    rows: int = 8,
    block: int = 256,
    warps: int = 4,
) -> None:
    assert x.is_contiguous() and table.is_contiguous()
    tokens, width = x.shape
    if tokens:
        # The largest power of two in the width leaves no lane idle: 128 of 1152.
        block = min(block, max(width & -width, min(64, pow2_ceil(width))))
        _position_kernel[(ceil_div(tokens, rows), ceil_div(width, block))](
            x, table, taps, weights, tokens, width, rows, block, num_warps=warps
        )


def add_position_embedding_ref(x: Tensor, table: Tensor, taps: Tensor, weights: Tensor) -> None:
    """The position embedding as the kernel adds it: float32 sum, rounded, added in place."""
    embedding = F.embedding_bag(taps, table.float(), per_sample_weights=weights, mode="sum")
    x.add_(embedding.to(x.dtype))


def add_position_embedding_(x: Tensor, table: Tensor, taps: Tensor, weights: Tensor) -> None:
    """Add to x [T, D], in place, the table's [N, D] rows `taps` (int32 [T, 4]) weighted by `weights` (float32 [T, 4])."""
    if use_triton(x):
        _position_triton(x, table, taps, weights)
    else:
        add_position_embedding_ref(x, table, taps, weights)
