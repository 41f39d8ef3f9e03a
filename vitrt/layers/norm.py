"""RMSNorm and LayerNorm, alone or behind the residual add they follow.

Shapes: T patches, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from vitrt.kernels.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from vitrt.layers.weights import WeightTarget, whole

EPS = 1e-6  # every norm of every family


class Norm(Protocol):
    """What a block asks of its norms."""

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor: ...

    def add_(
        self,
        residual: Tensor,
        delta: Tensor,
        delta_bias: Tensor | None,
        out: Tensor | None = None,
    ) -> Tensor:
        """residual += delta + delta_bias in place; returns its norm [T, D], all in one pass.

        The norm is written to `out`, else over `delta`.
        """
        ...

    def weight_targets(self, prefix: str) -> Iterator[WeightTarget]: ...


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, statistics in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width), requires_grad=False)

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        return rms_norm(x, self.weight, EPS, out=out)

    def add_(
        self,
        residual: Tensor,
        delta: Tensor,
        delta_bias: Tensor | None,
        out: Tensor | None = None,
    ) -> Tensor:
        out = delta if out is None else out
        return add_rms_norm(
            delta, delta_bias, residual, self.weight, EPS, sum_out=residual, out=out
        )[1]

    def weight_targets(self, prefix: str) -> Iterator[WeightTarget]:
        yield whole(f"{prefix}weight", self.weight)


class LayerNorm(nn.Module):
    """(x - mean) / std * weight + bias over the last dimension, statistics in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(width), requires_grad=False)

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        return layer_norm(x, self.weight, self.bias, EPS, out=out)

    def add_(
        self,
        residual: Tensor,
        delta: Tensor,
        delta_bias: Tensor | None,
        out: Tensor | None = None,
    ) -> Tensor:
        out = delta if out is None else out
        return add_layer_norm(
            delta, delta_bias, residual, self.weight, self.bias, EPS, sum_out=residual, out=out
        )[1]

    def weight_targets(self, prefix: str) -> Iterator[WeightTarget]:
        yield whole(f"{prefix}weight", self.weight)
        yield whole(f"{prefix}bias", self.bias)
