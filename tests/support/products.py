"""Random products and their results in float64, for tests of matrix products.

Tolerances: rounding to a dtype of unit roundoff u changes no element by more than u of itself, so
a result rounded r times is within r * u of the float64 one in relative L2; float32 sums over K add
K * 2^-24 at most.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitrt.kernels.gemm import Activation, linear_ref
from vitrt.kernels.gemm_table import Kind

UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def problem(
    kind: Kind,
    m: int = 77,
    n: int = 48,
    k: int = 40,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """x, weight, bias, residual; the product has unit variance, so that activations bend."""
    generator = torch.Generator(device).manual_seed(m * n + k)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    weight = normal(n, k) / k**0.5
    residual = normal(m, n) if kind == "residual" else None  # float32, as in the towers
    return normal(m, k).to(dtype), weight.to(dtype), normal(n).to(dtype), residual


def activation_of(kind: Kind) -> Activation:
    return None if kind in ("bias", "residual") else kind


def expected(kind: Kind, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None):
    """The result in float64."""
    operands = [None if each is None else each.double() for each in (bias, residual)]
    return linear_ref(
        x.double(),
        weight.double(),
        operands[0],
        activation=activation_of(kind),
        residual=operands[1],
    )


def relative_error(actual: Tensor, reference: Tensor) -> float:
    return ((actual.double() - reference).norm() / reference.norm()).item()


def tolerance(dtype: torch.dtype, k: int, roundings: int) -> float:
    # 4 u of float32 for what an activation does with its own roundings.
    return roundings * UNIT_ROUNDOFF[dtype] + (k + 4) * 2.0**-24
