"""Linear layers in float8 (e4m3): which operands, under which scales.

An operand's scale comes from a bound that weights alone give, so nothing is measured on data and
nothing can overflow. A normalised row of width D has the length sqrt(D) before its weight and bias.
Its elements are therefore at most sqrt(D), and its product with a weight's row at most sqrt(D)
times the length of that row (Cauchy and Schwarz). Such a bound is some 8 times the largest value
that comes; e4m3 keeps its full precision over 14 binades, so 3 of them are no loss.

A norm that feeds such a layer gives e4m3 from `FEWEST_ROWS` rows on, and a layer runs in e4m3 where
it is given that: below, products are too short to gain, and everything stays as it was.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vitrt.kernels.gemm_fp8 import E4M3, LARGEST, quantise_weight

FEWEST_ROWS = 2048
_MARGIN = 0.85  # of e4m3's range: what rounding the operands themselves may add to a bound


@dataclass(frozen=True, slots=True)
class Float8Norm:
    """A norm's weight and bias, float32 [D], times the scale of what it gives."""

    weight: Tensor
    bias: Tensor  # zeros for a norm without one
    scale: float

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> Float8Norm:
        shift = torch.zeros_like(weight, dtype=torch.float32) if bias is None else bias.float()
        largest = len(weight) ** 0.5 * weight.float().abs().max() + shift.abs().max()
        scale = LARGEST * _MARGIN / max(float(largest), 1e-30)
        return cls(weight.float() * scale, shift * scale, scale)

    def empty_like(self, x: Tensor) -> Tensor:
        """Where the norm of x [T, D] goes."""
        return torch.empty_like(x, dtype=E4M3)


@dataclass(frozen=True, slots=True)
class Float8Weight:
    """What a linear layer needs to run on e4m3 operands; see kernels/gemm_fp8.py."""

    weight: Tensor  # e4m3 [N, K]
    scale: Tensor  # float32 [N]
    bias: Tensor  # float32 [N]
    out_scale: Tensor | None = None  # float32 [N], where the result is e4m3, too

    @classmethod
    def of(
        cls, weight: Tensor, bias: Tensor | None, scale: float, out_scale: float | None = None
    ) -> Float8Weight:
        """`scale` is that of the operand x, `out_scale` that of the result."""
        quantised, row_scale = quantise_weight(weight)
        shift = torch.zeros_like(row_scale) if bias is None else bias.float()
        out = None if out_scale is None else torch.full_like(row_scale, out_scale)
        return cls(quantised, row_scale / scale, shift, out)


def gelu_scale(norm: Tensor, norm_bias: Tensor | None, weight: Tensor, bias: Tensor) -> float:
    """The scale of gelu(norm(x) W^T + b) [T, N], for a norm with weight and bias [D].

    gelu(y) is at most |y|, and y at most sqrt(D) times the length of a row of W after the norm's
    weight, beside what both biases add.
    """
    rows = weight.float()
    length = (rows * norm.float()).norm(dim=1) * len(norm) ** 0.5
    shift = bias.float() if norm_bias is None else rows @ norm_bias.float() + bias.float()
    return LARGEST * _MARGIN / max(float((length + shift.abs()).max()), 1e-30)
