"""RMSNorm and LayerNorm, alone or behind the residual add they follow.

Shapes: T patches, D width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from vitrt.kernels.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from vitrt.layers.float8 import FEWEST_ROWS, Float8Norm
from vitrt.layers.weights import WeightTarget, whole

EPS = 1e-6  # every norm of all families


class Norm(nn.Module):
    """What a block asks of its norms."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    float8: Float8Norm | None = None  # gives e4m3 for many rows

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """[T, D] -> [T, D], in `out` where it is given and the result is no e4m3."""
        raise NotImplementedError

    def add_(
        self,
        residual: Tensor,
        delta: Tensor,
        delta_bias: Tensor | None,
        out: Tensor | None = None,
    ) -> Tensor:
        """residual += delta + delta_bias in place; returns its norm [T, D], all in one pass.

        The norm is written to `out`, else over `delta`, unless it is e4m3.
        """
        raise NotImplementedError

    def _operands(
        self, x: Tensor, out: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(weight, bias, out) for the norm of x."""
        if self.float8 is None or len(x) < FEWEST_ROWS:
            return self.weight, self.bias, out
        return self.float8.weight, self.float8.bias, self.float8.empty_like(x)

    def weight_targets(self, prefix: str) -> Iterator[WeightTarget]:
        yield whole(f"{prefix}weight", self.weight)
        if self.bias is not None:
            yield whole(f"{prefix}bias", self.bias)


class RMSNorm(Norm):
    """x / rms(x) * weight over the last dimension, statistics in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width), requires_grad=False)
        self.bias = None

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        weight, _, out = self._operands(x, out)
        return rms_norm(x, weight, EPS, out=out)

    def add_(
        self,
        residual: Tensor,
        delta: Tensor,
        delta_bias: Tensor | None,
        out: Tensor | None = None,
    ) -> Tensor:
        weight, _, out = self._operands(delta, delta if out is None else out)
        return add_rms_norm(delta, delta_bias, residual, weight, EPS, sum_out=residual, out=out)[1]


class LayerNorm(Norm):
    """(x - mean) / std * weight + bias over the last dimension, statistics in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(width), requires_grad=False)

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        weight, bias, out = self._operands(x, out)
        assert bias is not None
        return layer_norm(x, weight, bias, EPS, out=out)

    def add_(
        self,
        residual: Tensor,
        delta: Tensor,
        delta_bias: Tensor | None,
        out: Tensor | None = None,
    ) -> Tensor:
        weight, bias, out = self._operands(delta, delta if out is None else out)
        assert bias is not None
        return add_layer_norm(
            delta, delta_bias, residual, weight, bias, EPS, sum_out=residual, out=out
        )[1]
