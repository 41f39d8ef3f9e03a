"""RMSNorm and LayerNorm, alone or after the residual add: a row is read once, into registers.

Float32 inside, weights too, and one rounding at the end, to the dtype of the weight. The residual
may be float32 beside products in 16 bits.

Shapes: T patches (or merged tokens), D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrt.kernels.dispatch import jit, row_tiles, tl, use_triton

# There are shares where rows are few: two warps hide more of a row's latency than one.
_SHARES_WARPS = 2


@jit()
def _read(
    x, delta_bias, residual, total, offsets, columns, mask, apart, ADD: tl.constexpr,
    BIASED: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    """A part of what is normalised, in float32: x, or the sum rounded to the dtype of `total`.

    x may be several shares, `apart` values from one to the next.
    """
    values = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    for share in tl.static_range(1, SHARES):
        values += tl.load(x + share * apart + offsets, mask=mask, other=0.0).to(tl.float32)
    if BIASED:
        values += tl.load(delta_bias + columns, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        values += tl.load(residual + offsets, mask=mask, other=0.0).to(tl.float32)
        # Rounded as the next reader will find it, so that fusing the add changes nothing.
        values = values.to(total.dtype.element_ty).to(tl.float32)
    return values


@jit()
def _read_affine(weight, bias, columns, D: tl.constexpr, CENTRE: tl.constexpr):
    """Weight and bias in float32, asked for before the sums so that their latencies overlap."""
    scale = tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32)
    shift = scale
    if CENTRE:
        shift = tl.load(bias + columns, mask=columns < D, other=0.0).to(tl.float32)
    return scale, shift


@jit()
def _write(values, scale, shift, out, offsets, mask, CENTRE: tl.constexpr):
    values *= scale
    if CENTRE:
        values += shift
    tl.store(out + offsets, values.to(out.dtype.element_ty), mask=mask)


@jit(do_not_specialize=["tokens"])
def _norm_kernel(
    x, delta_bias, residual, weight, bias, total, out, tokens, eps, D: tl.constexpr,
    MAIN: tl.constexpr, TAIL: tl.constexpr, CENTRE: tl.constexpr, ADD: tl.constexpr,
    BIASED: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    """A row a program, as a tile of MAIN values and, unless D is a power of two, one of TAIL.

    All of the row is asked for before any of it is written: a load does not pass a store.
    """
    start = tl.program_id(0).to(tl.int64) * D
    apart = tokens.to(tl.int64) * D
    columns = tl.arange(0, MAIN)
    mask = columns < D
    scale, shift = _read_affine(weight, bias, columns, D, CENTRE)
    values = _read(
        x, delta_bias, residual, total, start + columns, columns, mask, apart, ADD, BIASED, SHARES
    )
    if TAIL:
        tail_columns = MAIN + tl.arange(0, TAIL)
        tail_mask = tail_columns < D
        tail_scale, tail_shift = _read_affine(weight, bias, tail_columns, D, CENTRE)
        tail = _read(
            x, delta_bias, residual, total, start + tail_columns, tail_columns, tail_mask, apart,
            ADD, BIASED, SHARES,
        )  # fmt: skip
    if ADD:
        tl.store(total + start + columns, values.to(total.dtype.element_ty), mask=mask)
        if TAIL:
            target = total + start + tail_columns
            tl.store(target, tail.to(total.dtype.element_ty), mask=tail_mask)
    if CENTRE:
        mean = tl.sum(values, 0)
        if TAIL:
            mean += tl.sum(tail, 0)
        mean = mean / D
        values = tl.where(mask, values - mean, 0.0)
        if TAIL:
            tail = tl.where(tail_mask, tail - mean, 0.0)
    squares = tl.sum(values * values, 0)
    if TAIL:
        squares += tl.sum(tail * tail, 0)
    inverse = tl.rsqrt(squares / D + eps)
    _write(values * inverse, scale, shift, out, start + columns, mask, CENTRE)
    if TAIL:
        target = start + tail_columns
        _write(tail * inverse, tail_scale, tail_shift, out, target, tail_mask, CENTRE)


def _norm_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    residual: Tensor | None = None,
    delta_bias: Tensor | None = None,
    total: Tensor | None = None,
    out: Tensor | None = None,
    warps: int | None = None,
) -> Tensor:
    assert x.is_contiguous() and (residual is None or residual.is_contiguous())
    *shares, tokens, width = x.shape
    if out is None:
        out = torch.empty(tokens, width, dtype=weight.dtype, device=x.device)
    if tokens == 0:
        return out
    main, tail, row_warps = row_tiles(width)
    if shares:
        row_warps = max(row_warps, _SHARES_WARPS)
    _norm_kernel[(tokens,)](
        x, delta_bias, residual, weight, bias, total, out, tokens, eps, width, main, tail,
        bias is not None, residual is not None, delta_bias is not None, shares[0] if shares else 1,
        num_warps=warps or row_warps,
    )  # fmt: skip
    return out


def norm_ref(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """The norm as the kernel does it: float32 inside, one rounding."""
    if bias is None:
        return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(weight.dtype)
    normed = F.layer_norm(x.float(), weight.shape, weight.float(), bias.float(), eps)
    return normed.to(weight.dtype)


def add_ref(delta: Tensor, delta_bias: Tensor | None, residual: Tensor) -> Tensor:
    """residual + (delta + delta_bias), float32 inside, one rounding to the residual's dtype.

    delta [T, D], or shares of it [S, T, D].
    """
    total = delta.float()
    if delta.dim() == 3:
        total = total.sum(dim=0)
    if delta_bias is not None:
        total = total + delta_bias.float()
    return (total + residual.float()).to(residual.dtype)


def norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, out: Tensor | None = None
) -> Tensor:
    """LayerNorm of x [T, D] with weight and bias [D], or without a bias RMSNorm.

    Returns [T, D] in the weight's dtype, in `out` where it is given.
    """
    if use_triton(x):
        return _norm_triton(x, weight, bias, eps, out=out)
    normed = norm_ref(x, weight, bias, eps)
    return normed if out is None else out.copy_(normed)


def add_norm(
    delta: Tensor,
    delta_bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    sum_out: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(sum, `norm` of sum), both [T, D]; sum = residual + (delta + delta_bias), rounded once.

    delta [T, D], or float32 [S, T, D], shares that are added up. The sum has the residual's dtype,
    the norm the weight's. `sum_out` may be `residual` and `out` may be `delta`: all is read before
    its place is written.
    """
    if use_triton(delta):
        total = torch.empty_like(residual) if sum_out is None else sum_out
        normed = _norm_triton(
            delta, weight, bias, eps, residual=residual, delta_bias=delta_bias, total=total, out=out
        )
        return total, normed
    total = add_ref(delta, delta_bias, residual)
    if sum_out is not None:
        total = sum_out.copy_(total)
    return total, norm(total, weight, bias, eps, out=out)
