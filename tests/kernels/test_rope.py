"""RoPE against complex rotation in float64; T patches, H heads, Dh head size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.kernel_cases import EPS32, REFERENCE_DTYPES, assert_rounded, triton_cases
from vitrt.kernels import rope
from vitrt.kernels.segments import Rotary

SHAPES = [
    (5, 2, 72),
    (7, 3, 80),
    (3, 16, 72),
    (5, 12, 64),
    (2, 16, 80),
    (3, 4, 64),
    (2, 1, 128),
    (9, 2, 24),
    (4, 1, 40),
    (3, 2, 8),
    (0, 2, 72),
]


def inputs(
    tokens: int, heads: int, head_dim: int, device: str, dtype: torch.dtype, valid: int | None
) -> tuple[Tensor, Rotary]:
    frequencies = 10000.0 ** -(torch.arange(head_dim // 4, device=device) / (head_dim / 4))
    angles = torch.arange(37, device=device)[:, None] * frequencies
    positions = torch.randint(0, 37, (tokens, 2), device=device, dtype=torch.int32)
    qkv = torch.randn(tokens, 3, heads, head_dim, device=device).to(dtype)
    count = None
    if valid is not None:
        qkv[valid:] = torch.nan
        count = torch.tensor([valid], device=device, dtype=torch.int32)
    return qkv, Rotary(positions, angles.cos(), angles.sin(), count)


def check(actual: Tensor, qkv: Tensor, rotary: Rotary) -> None:
    count = qkv.shape[0] if rotary.valid is None else int(rotary.valid)
    assert not actual[count:].any()
    assert torch.equal(actual[:count, 2], qkv[:count, 2])
    cos, sin = (
        table[rotary.positions[:count].long()].double().flatten(1)[:, None, None, :]
        for table in (rotary.cos, rotary.sin)
    )
    low, high = qkv[:count, :2].double().chunk(2, dim=-1)
    turned = torch.complex(low, high) * torch.complex(cos, sin)
    exact = torch.cat([turned.real, turned.imag], -1)
    low_size, high_size = low.abs() + 0 * cos, high.abs() + 0 * cos
    slack = EPS32 * torch.cat(
        [
            low_size * cos.abs() + high_size * sin.abs(),
            high_size * cos.abs() + low_size * sin.abs(),
        ],
        -1,
    )
    assert_rounded(actual[:count, :2], exact, 2 * slack)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("device", "dtype", "shape"), triton_cases(SHAPES))
def test_rope_kernel(
    device: str, dtype: torch.dtype, shape: tuple[int, int, int], padded: bool
) -> None:
    valid = shape[0] // 2 if padded else None
    for tiling in ({}, {"block_h": 4, "spread": 4}) if shape in SHAPES[:2] else ({},):
        qkv, rotary = inputs(*shape, device, dtype, valid)
        actual = qkv.clone()
        rope._rope_triton(actual, rotary, **tiling)
        check(actual, qkv, rotary)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 72, 80, 128])
@pytest.mark.parametrize("valid", [None, 0, 1290, 1297])
def test_public_function_on_a_gpu(head_dim: int, valid: int | None) -> None:
    qkv, rotary = inputs(1297, 16, head_dim, "cuda", torch.bfloat16, valid)
    actual = qkv.clone()
    rope.rope_(actual, rotary)
    check(actual, qkv, rotary)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", REFERENCE_DTYPES)
@pytest.mark.parametrize(("tokens", "heads", "head_dim"), [*SHAPES, (131, 2, 72)])
def test_cpu_path(dtype: torch.dtype, tokens: int, heads: int, head_dim: int, padded: bool) -> None:
    qkv, rotary = inputs(tokens, heads, head_dim, "cpu", dtype, tokens // 2 if padded else None)
    actual = qkv.clone()
    rope.rope_(actual, rotary)
    check(actual, qkv, rotary)


def test_head_sizes_that_are_no_multiple_of_8_are_refused() -> None:
    qkv, rotary = inputs(2, 1, 20, "cpu", torch.float32, None)
    with pytest.raises(ValueError, match=r"head size 20 .* multiple of 8"):
        rope.rope_(qkv, rotary)
