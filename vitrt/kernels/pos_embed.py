"""Interpolated position embedding: four weighted taps of a learned table, added to the patches.

Shapes: T patches, D width, N entries of the table.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from vitrt.kernels.dispatch import jit, row_tiles, tl, use_triton


@jit()
def _add_taps(x, table, taps, weights, column, mask, D: tl.constexpr):
    values = tl.load(x + column, mask=mask, other=0.0)
    total = tl.zeros_like(column).to(tl.float32)
    for tap in tl.static_range(4):
        entry = table + tl.load(taps + tap).to(tl.int64) * D
        total += tl.load(weights + tap) * tl.load(entry + column, mask=mask, other=0.0).to(
            tl.float32
        )
    # transformers rounds the interpolated embedding before it adds it.
    rounded = total.to(x.dtype.element_ty).to(tl.float32)
    tl.store(x + column, (values.to(tl.float32) + rounded).to(x.dtype.element_ty), mask=mask)


# What a plan packs may lie anywhere: its alignment must not cost another compilation.
@jit(do_not_specialize_on_alignment=["taps", "weights"])
def _position_kernel(
    x, table, taps, weights, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr
):
    """One patch a program; the table (5 MB) stays in the second-level cache."""
    token = tl.program_id(0)
    x += token.to(tl.int64) * D
    taps += 4 * token
    weights += 4 * token
    column = tl.arange(0, MAIN)
    _add_taps(x, table, taps, weights, column, column < D, D)
    if TAIL:
        tail = MAIN + tl.arange(0, TAIL)
        _add_taps(x, table, taps, weights, tail, tail < D, D)


def _position_triton(
    x: Tensor, table: Tensor, taps: Tensor, weights: Tensor, warps: int | None = None
) -> None:
    assert x.is_contiguous() and table.is_contiguous()
    tokens, width = x.shape
    if tokens:
        main, tail, row_warps = row_tiles(width)
        _position_kernel[(tokens,)](
            x, table, taps, weights, width, main, tail, num_warps=warps or row_warps
        )


def add_position_embedding_ref(x: Tensor, table: Tensor, taps: Tensor, weights: Tensor) -> None:
    """The position embedding as the kernel adds it: float32 sum, rounded, added in place."""
    embedding = F.embedding_bag(taps, table.float(), per_sample_weights=weights, mode="sum")
    x.add_(embedding.to(x.dtype))


def add_position_embedding_(x: Tensor, table: Tensor, taps: Tensor, weights: Tensor) -> None:
    """Add to x [T, D], in place, rows `taps` (int32 [T, 4]) of table [N, D] times `weights` [T, 4].

    The weights are float32 and so is the sum of the four, which is rounded before it is added.
    """
    if use_triton(x):
        _position_triton(x, table, taps, weights)
    else:
        add_position_embedding_ref(x, table, taps, weights)
