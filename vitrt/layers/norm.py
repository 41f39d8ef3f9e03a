"""RMSNorm and LayerNorm, alone or fused with the residual add before them.

Shapes: T patches, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn

from vitrt.kernels.norm import add_norm, norm
from vitrt.layers.float8 import FEWEST_ROWS, Float8Norm
from vitrt.layers.weights import WeightTarget, whole

EPS = 1e-6  # every norm of all families


class Norm(nn.Module):
    """A norm over the last dimension, statistics in float32, alone or after a residual add."""

    has_bias: ClassVar[bool]
    float8: Float8Norm | None = None  # gives e4m3 for many rows

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width), requires_grad=False)
        self.bias: nn.Parameter | None = None
        if self.has_bias:
            self.bias = nn.Parameter(torch.empty(width), requires_grad=False)

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """[T, D] -> [T, D], in `out` where it is given and the result is no e4m3."""
        weight, bias, out = self._operands(x, out)
        return norm(x, weight, bias, EPS, out=out)

    def add_(
        self, residual: Tensor, delta: Tensor, delta_bias: Tensor | None, out: Tensor | None = None
    ) -> Tensor:
        """residual += delta + delta_bias in place; returns its norm [T, D], all in one pass.

        delta [T, D], or shares of it [S, T, D]. The norm is written to `out`, else over a `delta`
        in one piece, unless it is e4m3.
        """
        if out is None and delta.dim() == 2:
            out = delta
        weight, bias, out = self._operands(residual, out)
        return add_norm(delta, delta_bias, residual, weight, bias, EPS, sum_out=residual, out=out)[
            1
        ]

    def _operands(
        self, x: Tensor, out: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(weight, bias, out) for the norm of x."""
        if self.float8 is None or len(x) < FEWEST_ROWS:
            return self.weight, self.bias, out
        bias = self.float8.bias if self.has_bias else None
        return self.float8.weight, bias, self.float8.empty_like(x)

    def weight_targets(self, prefix: str) -> Iterator[WeightTarget]:
        yield whole(f"{prefix}weight", self.weight)
        if self.bias is not None:
            yield whole(f"{prefix}bias", self.bias)


class RMSNorm(Norm):
    """x / rms(x) * weight."""

    has_bias = False


class LayerNorm(Norm):
    """(x - mean) / std * weight + bias."""

    has_bias = True
