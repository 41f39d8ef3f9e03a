"""Activations against float64, one rounding apart; T tokens, F width after SwiGLU, N width."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.kernel_cases import (
    EPS32,
    REFERENCE_DTYPES,
    TRITON_CASES,
    assert_rounded,
    triton_cases,
)
from vitrt.kernels import activation

SHAPES = [(3, 6840), (1, 4304), (7, 130), (2, 66), (3, 2), (0, 64)]
KINDS = ["gelu", "gelu_tanh", "quick_gelu"]
# Quotients near the end of the float32 range may be flushed to zero.
UNDERFLOW = 1e-35
# exp(-x) overflows to infinity where the activation is zero; only the interpreter's numpy says so.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")


def with_bias(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The sum in float64, and the error of the same sum in float32."""
    if bias is None:
        return x.double(), torch.zeros_like(x, dtype=torch.float64)
    exact = x.double() + bias.double()
    return exact, 0.5 * EPS32 * exact.abs()


def check_swiglu(actual: Tensor, gate_up: Tensor, bias: Tensor | None) -> None:
    values, error = with_bias(gate_up, bias)
    gate, up = values[:, ::2], values[:, 1::2]
    exact = F.silu(gate) * up
    # exp(-g) carries the rounding of g; silu's slope is at most 1.1.
    slack = EPS32 * (8 + 4 * gate.abs()) * exact.abs() + UNDERFLOW
    slack = slack + 1.1 * error[:, ::2] * up.abs() + exact.abs() * EPS32
    assert_rounded(actual, exact, slack)


def check_gelu(actual: Tensor, x: Tensor, bias: Tensor | None, kind: str) -> None:
    values, error = with_bias(x, bias)
    if kind == "gelu":
        exact = F.gelu(values)
        slack = 4 * EPS32 * values.abs()  # 1 + erf cancels in the left tail
    elif kind == "quick_gelu":
        exact = values * torch.sigmoid(1.702 * values)
        slack = EPS32 * (8 + 4 * values.abs()) * exact.abs() + UNDERFLOW
    else:
        # As a sigmoid: 1 + tanh cancels in the left tail, in float64 too.
        exponent = 2 * math.sqrt(2 / math.pi) * (values + 0.044715 * values**3)
        exact = values * torch.sigmoid(exponent)
        slack = EPS32 * (8 + 4 * exponent.abs()) * exact.abs() + UNDERFLOW
        if not actual.is_cuda:
            slack = slack + 4 * EPS32 * values.abs()  # PyTorch computes 1 + tanh
    assert_rounded(actual, exact, slack + 1.2 * error)


def inputs(
    tokens: int, width: int, device: str, dtype: torch.dtype, biased: bool
) -> tuple[Tensor, Tensor | None]:
    x = 3.0 * torch.randn(tokens, width, device=device)
    special = torch.tensor([0.0, -0.0, 30.0, -30.0, -4.0, 1e-6], device=device)
    x.view(-1)[: special.numel()] = special[: x.numel()]
    bias = torch.randn(width, device=device).to(dtype) if biased else None
    return x.to(dtype), bias


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("device", "dtype", "shape"), triton_cases(SHAPES))
def test_swiglu_kernel(
    device: str, dtype: torch.dtype, shape: tuple[int, int], biased: bool
) -> None:
    x, bias = inputs(*shape, device, dtype, biased)
    out = torch.full((shape[0], shape[1] // 2), torch.nan, device=device, dtype=dtype)
    assert activation._swiglu_triton(x, bias, out) is out
    check_swiglu(out, x, bias)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("device", "dtype", "shape"), triton_cases(SHAPES))
def test_bias_act_kernel(
    device: str, dtype: torch.dtype, shape: tuple[int, int], biased: bool, kind: str
) -> None:
    x, bias = inputs(*shape, device, dtype, biased)
    out = torch.full_like(x, torch.nan)
    assert activation._bias_act_triton(x, bias, kind, out) is out
    check_gelu(out, x, bias, kind)
    activation._bias_act_triton(x, bias, kind, x)
    assert torch.equal(x, out)


@pytest.mark.parametrize(("device", "dtype"), TRITON_CASES)
def test_a_bias_wider_than_a_block_starts_anywhere_in_it(device: str, dtype: torch.dtype) -> None:
    x, bias = inputs(3, 8192, device, dtype, biased=True)
    out = torch.full_like(x, torch.nan)
    activation._bias_act_triton(x, bias, "gelu_tanh", out)
    check_gelu(out, x, bias, "gelu_tanh")


@pytest.mark.gpu
def test_public_functions_on_a_gpu() -> None:
    x, bias = inputs(41473, 4304, "cuda", torch.bfloat16, biased=True)
    for shift in (None, bias):
        check_swiglu(activation.swiglu(x, shift), x, shift)
        for kind in KINDS:
            check_gelu(activation.bias_act(x, shift, kind), x, shift, kind)


@pytest.mark.parametrize("dtype", REFERENCE_DTYPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("tokens", "width"), SHAPES)
def test_cpu_path(dtype: torch.dtype, tokens: int, width: int, biased: bool) -> None:
    x, bias = inputs(tokens, width, "cpu", dtype, biased)
    before = x.clone()
    check_swiglu(activation.swiglu(x, bias), x, bias)
    for kind in KINDS:
        out = torch.full_like(x, torch.nan)
        assert activation.bias_act(x, bias, kind, out=out) is out
        check_gelu(out, x, bias, kind)
    assert torch.equal(x, before)


def test_unknown_activations_are_refused() -> None:
    with pytest.raises(ValueError, match="'relu' is none of gelu, gelu_tanh, quick_gelu"):
        activation.bias_act(torch.zeros(1, 8), None, "relu")  # type: ignore[arg-type]
