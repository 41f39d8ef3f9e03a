"""Norms against float64, one rounding apart; T tokens, D width."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.kernel_cases import (
    EPS32,
    REFERENCE_DTYPES,
    TRITON_CASES,
    assert_rounded,
    random_like_weights,
    triton_cases,
)
from vitrt.kernels import norm

EPS = 1e-6
SHAPES = [
    (5, 1280),
    (1, 1152),
    (3, 4608),
    (3, 5120),
    (7, 1000),
    (4, 77),
    (2, 3),
    (0, 1152),
]


def check_norm(actual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """float32 statistics: a handful of roundings of sums, and of x - mean relative to x."""
    values, scale = x.double(), weight.double()
    spread = values.abs()
    if bias is not None:
        mean = values.mean(-1, keepdim=True)
        spread = spread + mean.abs()
        values = values - mean
    factor = (values.square().mean(-1, keepdim=True) + EPS).rsqrt()
    exact = values * factor * scale
    slack = EPS32 * (16 * exact.abs() + 4 * spread * factor * scale.abs())
    if bias is not None:
        exact = exact + bias.double()
        slack = slack + EPS32 * exact.abs()
    assert_rounded(actual, exact, slack)


def check_sum(actual: Tensor, delta: Tensor, delta_bias: Tensor | None, residual: Tensor) -> None:
    terms = [delta.double(), residual.double()]
    if delta_bias is not None:
        terms.append(delta_bias.double().expand_as(delta))
    magnitude = torch.stack(terms).abs().sum(0)
    assert_rounded(actual, torch.stack(terms).sum(0), EPS32 * magnitude)


def inputs(
    tokens: int, width: int, device: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x with a mean and rows of very different size, residual, weight, bias, bias of delta."""
    x = torch.randn(tokens, width, device=device) + 1.0
    x = x * torch.logspace(-2, 2, max(tokens, 1), device=device)[:tokens, None]
    weight = random_like_weights(width, device=device, dtype=dtype)
    return (
        x.to(dtype),
        torch.randn(tokens, width, device=device).to(dtype),
        weight,
        torch.randn(width, device=device).to(dtype),
        torch.randn(width, device=device).to(dtype),
    )


@pytest.mark.parametrize("centre", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize(("device", "dtype", "shape"), triton_cases(SHAPES))
def test_norm_kernel(device: str, dtype: torch.dtype, shape: tuple[int, int], centre: bool) -> None:
    x, _, weight, bias, _ = inputs(*shape, device, dtype)
    out = torch.full_like(x, torch.nan)
    result = norm._norm_triton(x, weight, bias if centre else None, EPS, out=out)
    assert result is out
    check_norm(out, x, weight, bias if centre else None)


@pytest.mark.parametrize(
    ("centre", "biased"), [(False, False), (True, True)], ids=["rms", "biased-layer"]
)
@pytest.mark.parametrize(("device", "dtype", "shape"), triton_cases(SHAPES))
def test_add_norm_kernel(
    device: str, dtype: torch.dtype, shape: tuple[int, int], centre: bool, biased: bool
) -> None:
    delta, residual, weight, bias, delta_bias = inputs(*shape, device, dtype)
    total, out = torch.full_like(delta, torch.nan), torch.full_like(delta, torch.nan)
    norm._norm_triton(
        delta,
        weight,
        bias if centre else None,
        EPS,
        residual=residual,
        delta_bias=delta_bias if biased else None,
        total=total,
        out=out,
    )
    check_sum(total, delta, delta_bias if biased else None, residual)
    check_norm(out, total, weight, bias if centre else None)


@pytest.mark.parametrize(("device", "dtype"), TRITON_CASES)
def test_add_norm_kernel_in_place(device: str, dtype: torch.dtype) -> None:
    delta, residual, weight, bias, delta_bias = inputs(5, 1152, device, dtype)
    before = delta.clone(), residual.clone()
    norm._norm_triton(
        delta,
        weight,
        bias,
        EPS,
        residual=residual,
        delta_bias=delta_bias,
        total=residual,
        out=delta,
    )
    check_sum(residual, before[0], delta_bias, before[1])
    check_norm(delta, residual, weight, bias)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 1297, 41473])
def test_public_functions_on_a_gpu(tokens: int) -> None:
    delta, residual, weight, bias, delta_bias = inputs(tokens, 1152, "cuda", torch.bfloat16)
    check_norm(norm.norm(delta, weight, None, EPS), delta, weight, None)
    check_norm(norm.norm(delta, weight, bias, EPS), delta, weight, bias)
    total, normed = norm.add_norm(delta, delta_bias, residual, weight, bias, EPS)
    check_sum(total, delta, delta_bias, residual)
    check_norm(normed, total, weight, bias)
    total, normed = norm.add_norm(delta, None, residual, weight, None, EPS)
    check_sum(total, delta, None, residual)
    check_norm(normed, total, weight, None)


@pytest.mark.parametrize("dtype", REFERENCE_DTYPES)
@pytest.mark.parametrize(("tokens", "width"), SHAPES)
def test_cpu_path(dtype: torch.dtype, tokens: int, width: int) -> None:
    delta, residual, weight, bias, delta_bias = inputs(tokens, width, "cpu", dtype)
    check_norm(norm.norm(delta, weight, None, EPS), delta, weight, None)
    check_norm(norm.norm(delta, weight, bias, EPS), delta, weight, bias)
    for shift in (None, delta_bias):
        total, normed = norm.add_norm(delta, shift, residual, weight, None, EPS)
        check_sum(total, delta, shift, residual)
        check_norm(normed, total, weight, None)
    kept, expected = residual.clone(), norm.add_norm(delta, None, residual, weight, bias, EPS)
    out = torch.full_like(delta, torch.nan)
    total, normed = norm.add_norm(delta, None, kept, weight, bias, EPS, sum_out=kept, out=out)
    assert total is kept and normed is out
    assert torch.equal(total, expected[0]) and torch.equal(normed, expected[1])
    check_norm(normed, total, weight, bias)


@pytest.mark.parametrize("centre", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize(("device", "dtype"), TRITON_CASES)
def test_float32_residual_beside_narrow_products(
    device: str, dtype: torch.dtype, centre: bool
) -> None:
    """As the towers call it: the sum stays float32 and unrounded, the norm comes out narrow."""
    delta, residual, weight, bias, delta_bias = inputs(5, 1152, device, dtype)
    residual = residual.float() * 1.0001  # no longer a number of the narrow dtype
    before, delta_before = residual.clone(), delta.clone()
    shift = bias if centre else None
    total, normed = norm.add_norm(
        delta, delta_bias, residual, weight, shift, EPS, sum_out=residual, out=delta
    )
    assert total is residual and normed is delta
    assert total.dtype == torch.float32 and normed.dtype == dtype
    check_sum(total, delta_before, delta_bias, before)
    check_norm(normed, total, weight, shift)
    alone = norm.norm(total, weight, shift, EPS)
    assert alone.dtype == dtype
    check_norm(alone, total, weight, shift)
