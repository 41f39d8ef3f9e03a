"""Position embedding against float64; T patches, D width, N entries of the table."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.support.kernel_cases import (
    EPS32,
    REFERENCE_DTYPES,
    TRITON_CASES,
    assert_rounded,
    triton_cases,
)
from vitrt.kernels import pos_embed

SHAPES = [(5, 1152), (3, 1024), (7, 96), (2, 1000), (4, 7), (0, 64)]


def inputs(
    tokens: int, width: int, device: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.randn(tokens, width, device=device).to(dtype),
        torch.randn(31, width, device=device).to(dtype),
        torch.randint(0, 31, (tokens, 4), device=device, dtype=torch.int32),
        torch.rand(tokens, 4, device=device),
    )


def check(actual: Tensor, x: Tensor, table: Tensor, taps: Tensor, weights: Tensor) -> None:
    """The embedding is rounded once before the sum with x is, and is exact but for float32."""
    terms = weights.double()[..., None] * table.double()[taps.long()]
    exact = terms.sum(1)
    slack = 4 * EPS32 * terms.abs().sum(1)
    if x.any():
        info = torch.finfo(x.dtype)
        slack = slack + 0.5 * info.eps * (exact.abs() + slack) + info.smallest_normal * info.eps
        slack = slack + EPS32 * (exact.abs() + x.double().abs())
    assert_rounded(actual, x.double() + exact, slack)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize(("device", "dtype", "shape"), triton_cases(SHAPES))
def test_position_kernel(
    device: str, dtype: torch.dtype, shape: tuple[int, int], zero: bool
) -> None:
    x, table, taps, weights = inputs(*shape, device, dtype)
    if zero:
        x.zero_()
    actual = x.clone()
    pos_embed._position_triton(actual, table, taps, weights)
    check(actual, x, table, taps, weights)


def check_order_of_roundings(
    add: Callable[[Tensor, Tensor, Tensor, Tensor], None], device: str, dtype: torch.dtype
) -> None:
    """Taps and weights of few bits: their sum is exact in float32, not in 16 bits."""
    x = torch.randn(5, 1152, device=device).to(dtype)
    table = (torch.randint(-64, 64, (31, 1152), device=device) / 64).to(dtype)
    taps = torch.randint(0, 31, (5, 4), device=device, dtype=torch.int32)
    weights = torch.randint(0, 16, (5, 4), device=device) / 16
    embedding = (weights[..., None] * table[taps.long()].float()).sum(1).to(dtype)
    expected = (x.float() + embedding.float()).to(dtype)
    add(x, table, taps, weights)
    assert torch.equal(x, expected)


@pytest.mark.parametrize(("device", "dtype"), TRITON_CASES)
def test_position_kernel_rounds_before_it_adds(device: str, dtype: torch.dtype) -> None:
    check_order_of_roundings(pos_embed._position_triton, device, dtype)


@pytest.mark.parametrize("dtype", REFERENCE_DTYPES)
def test_cpu_path_rounds_before_it_adds(dtype: torch.dtype) -> None:
    check_order_of_roundings(pos_embed.add_position_embedding_, "cpu", dtype)


@pytest.mark.gpu
def test_public_function_on_a_gpu() -> None:
    x, table, taps, weights = inputs(1297, 1152, "cuda", torch.bfloat16)
    actual = x.clone()
    pos_embed.add_position_embedding_(actual, table, taps, weights)
    check(actual, x, table, taps, weights)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("dtype", REFERENCE_DTYPES)
@pytest.mark.parametrize(("tokens", "width"), SHAPES)
def test_cpu_path(dtype: torch.dtype, tokens: int, width: int, zero: bool) -> None:
    x, table, taps, weights = inputs(tokens, width, "cpu", dtype)
    if zero:
        x.zero_()
    actual = x.clone()
    pos_embed.add_position_embedding_(actual, table, taps, weights)
    check(actual, x, table, taps, weights)
