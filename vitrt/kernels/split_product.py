"""Split-K products of few rows, their sum left to the norm that follows: they add to the residual.

A narrow product of few rows has fewer tiles than the GPU has processors. Here K is split over
programs, each leaves its sums in float32, and the norm that follows adds them up with bias and
residual (norm.py): nothing is rounded in between, and there is no kernel in between to sum the
shares, as cuBLAS has one.

Shapes: M rows, K input and N output features, S shares.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitrt.kernels.dispatch import ceil_div, dot_precision, jit, tl
from vitrt.kernels.gemm_table import SplitTile


@jit(do_not_specialize=["m"])
def _split_kernel(
    x, weight, out, m, N: tl.constexpr, K: tl.constexpr, M_TILE: tl.constexpr,
    N_TILE: tl.constexpr, K_TILE: tl.constexpr, SHARES: tl.constexpr, TRANSPOSED: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of M_TILE x N_TILE over one share of K. TRANSPOSED: the weight is the left operand."""
    STEPS: tl.constexpr = (K + K_TILE - 1) // K_TILE
    EACH: tl.constexpr = (STEPS + SHARES - 1) // SHARES * K_TILE
    column = tl.program_id(0) * N_TILE + tl.arange(0, N_TILE)
    row = tl.program_id(1) * M_TILE + tl.arange(0, M_TILE)
    share = tl.program_id(2)
    first = share * EACH
    last = tl.minimum(first + EACH, K)
    step = tl.arange(0, K_TILE)
    # Columns and rows past the end are read again from the start, and not written.
    weight_rows = weight + (column % N).to(tl.int64) * K
    x_rows = x + (row % m).to(tl.int64) * K
    if TRANSPOSED:
        acc = tl.zeros((N_TILE, M_TILE), tl.float32)
    else:
        acc = tl.zeros((M_TILE, N_TILE), tl.float32)
    for at in tl.range(first, last, K_TILE, num_stages=STAGES):
        live = at + step < last
        if TRANSPOSED:
            w = tl.load(weight_rows[:, None] + (at + step)[None, :], mask=live[None, :], other=0.0)
            v = tl.load(x_rows[None, :] + (at + step)[:, None], mask=live[:, None], other=0.0)
            acc = tl.dot(w, v, acc, input_precision=PRECISION)
        else:
            v = tl.load(x_rows[:, None] + (at + step)[None, :], mask=live[None, :], other=0.0)
            w = tl.load(weight_rows[None, :] + (at + step)[:, None], mask=live[:, None], other=0.0)
            acc = tl.dot(v, w, acc, input_precision=PRECISION)
    if TRANSPOSED:
        acc = tl.trans(acc)
    target = out + (share * m + row).to(tl.int64)[:, None] * N + column[None, :]
    tl.store(target, acc, mask=(row < m)[:, None] & (column < N)[None, :])


def split_product(x: Tensor, weight: Tensor, tile: SplitTile) -> Tensor:
    """float32 [S, M, N], whose sum over S is x [M, K] weight [N, K]^T; by Triton alone."""
    assert x.is_contiguous() and weight.is_contiguous()
    (m, k), n = x.shape, weight.shape[0]
    out = torch.empty(tile.shares, m, n, dtype=torch.float32, device=x.device)
    _split_kernel[(ceil_div(n, tile.n), ceil_div(m, tile.m), tile.shares)](
        x, weight, out, m, n, k, tile.m, tile.n, tile.k, tile.shares, tile.transposed, tile.stages,
        dot_precision(x),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out
