"""A matrix product with everything in the epilogue whose rows do not depend on their neighbours.

One tile and one order of sums whatever M is: a row of the result is the same bits alone and among
others. (cuBLAS chooses kernels by M.) Used for that alone; it is no match for cuBLAS's speed.

Shapes: M rows, K input and N output features; swiglu pairs columns: N = 2F, g0, u0, g1, u1, ...
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vitrt.kernels.dispatch import ceil_div, dot_precision, jit, tl
from vitrt.kernels.gemm_table import Kind


@jit(do_not_specialize=["m"])
def _product_kernel(
    x, weight, bias, residual, out, m, stride_x, stride_out, stride_residual, N: tl.constexpr,
    K: tl.constexpr, M_TILE: tl.constexpr, N_TILE: tl.constexpr, K_TILE: tl.constexpr,
    GROUP: tl.constexpr, KIND: tl.constexpr, BIASED: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of the result a program. GROUP tiles of rows share the weight's tiles in cache."""
    columns = tl.cdiv(N, N_TILE)
    row_tiles = tl.cdiv(m, M_TILE)
    program = tl.program_id(0)
    first = program // (GROUP * columns) * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    inside = program % (GROUP * columns)
    row = (first + inside % height) * M_TILE + tl.arange(0, M_TILE)
    column = inside // height * N_TILE + tl.arange(0, N_TILE)
    step = tl.arange(0, K_TILE)
    # Rows and columns past the end are read again from the start, and not written.
    left = x + (row % m).to(tl.int64)[:, None] * stride_x + step[None, :]
    right = weight + (column % N).to(tl.int64)[None, :] * K + step[:, None]
    acc = tl.zeros((M_TILE, N_TILE), tl.float32)
    for at in tl.range(0, K, K_TILE, num_stages=STAGES):
        if K % K_TILE:
            a = tl.load(left, mask=step[None, :] < K - at, other=0.0)
            b = tl.load(right, mask=step[:, None] < K - at, other=0.0)
        else:
            a = tl.load(left)
            b = tl.load(right)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        left += K_TILE
        right += K_TILE
    if BIASED:
        acc += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    live_row = (row < m)[:, None]
    if KIND == "swiglu":
        gate, up = tl.split(tl.reshape(acc, (M_TILE, N_TILE // 2, 2)))
        acc = gate / (1.0 + tl.exp(-gate)) * up
        half = inside // height * (N_TILE // 2) + tl.arange(0, N_TILE // 2)
        target = out + row.to(tl.int64)[:, None] * stride_out + half[None, :]
        live = live_row & (half < N // 2)[None, :]
    else:
        target = out + row.to(tl.int64)[:, None] * stride_out + column[None, :]
        live = live_row & (column < N)[None, :]
    if KIND == "gelu":
        acc = 0.5 * acc * (1.0 + tl.erf(acc * 0.7071067811865476))
    if KIND == "gelu_tanh":
        # 0.5 (1 + tanh(u)) = 1 / (1 + exp(-2u)), u = sqrt(2 / pi) (v + 0.044715 v^3)
        acc = acc / (1.0 + tl.exp(-1.5957691216057308 * (acc + 0.044715 * acc * acc * acc)))
    if KIND == "quick_gelu":
        acc = acc / (1.0 + tl.exp(-1.702 * acc))
    if KIND == "residual":
        before = residual + row.to(tl.int64)[:, None] * stride_residual + column[None, :]
        acc += tl.load(before, mask=live, other=0.0).to(tl.float32)
    tl.store(target, acc.to(out.dtype.element_ty), mask=live)


@dataclass(frozen=True, slots=True)
class ProductTiling:
    """The kernel's block sizes, and how Triton compiles it."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


# 96 KiB of operands in flight: what every GPU from Ampere on has for one block.
_HALF = ProductTiling(128, 128, 64, 8, 3)
_FLOAT32 = ProductTiling(32, 64, 32, 4, 2)  # outside the tensor cores
_GROUP = 8


def product(
    kind: Kind,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`gemm.linear` on a GPU: float32 inside, rounded once."""
    assert x.stride(1) == 1 and weight.is_contiguous()
    (m, k), n = x.shape, weight.shape[0]
    if out is None:
        width = n // 2 if kind == "swiglu" else n
        out = torch.empty(
            m, width, dtype=(x if residual is None else residual).dtype, device=x.device
        )
    if m == 0:
        return out
    tiling = _FLOAT32 if x.dtype == torch.float32 else _HALF
    _product_kernel[(ceil_div(m, tiling.m) * ceil_div(n, tiling.n),)](
        x, weight, bias, residual, out, m, x.stride(0), out.stride(0),
        0 if residual is None else residual.stride(0), n, k, tiling.m, tiling.n, tiling.k, _GROUP,
        kind, bias is not None, tiling.stages, dot_precision(x),
        num_warps=tiling.warps, num_stages=tiling.stages,
    )  # fmt: skip
    return out
