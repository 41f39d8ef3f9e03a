"""Linear layers in float8 (e4m3): which operands, under which scales.

An operand's scale comes from a bound that weights alone give, so nothing is measured on data and
nothing can overflow. A normalised row of width D has the length sqrt(D) before its weight and bias.
Its elements are therefore at most sqrt(D), and its product with a weight's row at most sqrt(D)
times the length of that row (Cauchy and Schwarz). Such a bound is some 8 times the largest value
that comes; e4m3 keeps its full precision over 14 binades, so 3 of them are no loss.

From `FEWEST_ROWS` rows on, a norm that feeds such a layer gives e4m3, as the epilogue before fc2
does; what attention and SwiGLU leave in bfloat16 is cast. With fewer rows nothing changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vitrt.kernels.gemm_fp8 import E4M3, quantise_weight
from vitrt.kernels.to_e4m3 import LARGEST

# Fused products of e4m3 take 0.4 to 0.7 of the time of those in bfloat16 at 1296 to 41472 rows
# (H200); fewer were not measured.
FEWEST_ROWS = 1024
_MARGIN = 0.85  # of e4m3's range: what rounding the operands themselves may add to a bound


class AffineNorm(Protocol):
    """A norm's weight and bias [D]."""

    @property
    def weight(self) -> Tensor: ...

    @property
    def bias(self) -> Tensor | None: ...


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
        scale = scale_for(largest)
        return cls(weight.float() * scale, shift * scale, scale)

    def empty_like(self, x: Tensor) -> Tensor:
        """Memory for the norm of x [T, D]."""
        return torch.empty_like(x, dtype=E4M3)


@dataclass(frozen=True, slots=True)
class Float8Weight:
    """What a linear layer needs to run on e4m3 operands; see kernels/gemm_fp8.py."""

    weight: Tensor  # e4m3 [N, K]
    scale: Tensor  # float32 [N]
    bias: Tensor  # float32 [N]
    in_scale: float  # of the operand x
    out_scale: Tensor | None = None  # float32 [N], where the result is e4m3, too

    @classmethod
    def of(
        cls, weight: Tensor, bias: Tensor | None, scale: float, out_scale: float | None = None
    ) -> Float8Weight:
        """From weight [N, K] and bias [N]; `scale` is that of x, `out_scale` that of the result."""
        quantised, row_scale = quantise_weight(weight)
        shift = torch.zeros_like(row_scale) if bias is None else bias.float()
        out = None if out_scale is None else torch.full_like(row_scale, out_scale)
        return cls(quantised, row_scale / scale, shift, scale, out)


def product_bound(norm: AffineNorm, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What |norm(x) W^T + b| [T, N] can be at most, float32 [N], for a norm over D.

    sqrt(D) times the length of a row of W after the norm's weight, beside what both biases add.
    """
    rows = weight.float()
    length = (rows * norm.weight.float()).norm(dim=1) * len(norm.weight) ** 0.5
    shift = torch.zeros_like(length) if bias is None else bias.float()
    if norm.bias is not None:
        shift = shift + rows @ norm.bias.float()
    return length + shift.abs()


def scale_for(bound: Tensor) -> float:
    """The scale that keeps what is within `bound` in e4m3's range."""
    return LARGEST * _MARGIN / max(float(bound.max()), 1e-30)
