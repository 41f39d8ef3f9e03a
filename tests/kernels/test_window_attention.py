"""The window kernel: the interpreter in float32 here, bfloat16 on a GPU."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.support.attention_cases import dense_reference, make_segments, rotary_case, rotated
from tests.support.interpreter import interpreted
from vitrt.kernels.attention_block import split_pairs
from vitrt.kernels.segments import Rotary, Segments
from vitrt.kernels.window_attention import (
    VARIANTS,
    WindowTiling,
    _window_triton,
    window_attention,
    window_attention_ref,
)

PLAIN = WindowTiling(2, False, 4, 1, 4)


@interpreted
@pytest.mark.parametrize("head_dim", [8, 24, 40, 64, 72, 80, 96, 128])
@pytest.mark.parametrize("lengths", [[64], [4, 64, 16, 48, 8, 60], [1, 3]], ids=str)
def test_kernel_equals_dense(head_dim: int, lengths: list[int]) -> None:
    qkv, rotary, out = rotary_case(lengths, 5, 2, head_dim)
    before = qkv.clone()
    _window_triton(qkv, make_segments(lengths, room=3, tiles=False), rotary, out, PLAIN)
    tokens = sum(lengths)
    expected = dense_reference(rotated(qkv, rotary), lengths)
    # float32 throughout: rounding over 64 keys of at most 128 products stays well under this.
    torch.testing.assert_close(out[:tokens].double(), expected, rtol=1e-5, atol=1e-5)
    assert out[tokens:].isnan().all(), "rows outside every window are left unwritten"
    assert torch.equal(qkv.nan_to_num(), before.nan_to_num()), "qkv is only read"


@interpreted
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(("heads", "group"), [(3, 4), (6, 4), (4, 4), (5, 1), (12, 4)])
def test_head_groups(heads: int, group: int, keep: bool) -> None:
    lengths = [16, 64, 4]
    qkv, rotary, out = rotary_case(lengths, 0, heads, 64 if heads == 12 else 80)
    segments = make_segments(lengths, tiles=False)
    _window_triton(qkv, segments, rotary, out, replace(PLAIN, heads=group, keep=keep))
    expected = dense_reference(rotated(qkv, rotary), lengths)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@interpreted
def test_replay_with_other_boundaries() -> None:
    """A graph replays the launch: only what the tensors hold may change."""
    first, second = [64, 32, 16], [16, 8, 64, 4]
    qkv, rotary, out = rotary_case(first, 0, 2, 40)
    segments = make_segments(first, room=3, tiles=False)
    _window_triton(qkv, segments, rotary, out, PLAIN)
    expected = dense_reference(rotated(qkv, rotary), first)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    cu = torch.from_numpy(np.cumsum([0, *second]).astype(np.int32))
    segments.cu_seqlens[: len(cu)] = cu
    segments.cu_seqlens[len(cu) :] = cu[-1]
    segments.count.fill_(len(second))
    _window_triton(qkv, replace(segments, lengths=()), rotary, out.fill_(math.nan), PLAIN)
    expected = dense_reference(rotated(qkv, rotary), second)
    torch.testing.assert_close(out[:92].double(), expected, rtol=1e-5, atol=1e-5)
    assert out[92:].isnan().all()


def test_reference_is_the_cpu_path() -> None:
    lengths = [64, 8, 36]
    qkv, rotary, out = rotary_case(lengths, 0, 2, 80)
    segments = make_segments(lengths, tiles=False)
    if torch.cuda.is_available():
        window_attention_ref(qkv, segments, rotary, out)
    else:
        window_attention(qkv, segments, rotary, out)
    expected = dense_reference(rotated(qkv, rotary), lengths)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_long_windows_are_refused() -> None:
    qkv, rotary, out = rotary_case([65], 0, 1, 8)
    with pytest.raises(ValueError, match="at most 64 patches, got 65"):
        window_attention(qkv, make_segments([65]), rotary, out)


@pytest.mark.parametrize(
    ("head_dim", "parts"),
    [(8, (16, 0)), (24, (16, 0)), (40, (16, 16)), (64, (32, 0)), (72, (32, 16)), (80, (32, 16)),
     (96, (32, 32)), (128, (64, 0))],
)  # fmt: skip
def test_split_pairs(head_dim: int, parts: tuple[int, int]) -> None:
    assert split_pairs(head_dim) == parts


def check_on_gpu(tiling: WindowTiling, head_dim: int, heads: int) -> None:
    lengths, padding = [64] * 300 + [32, 16, 4, 60, 8], 30
    qkv, rotary, out = rotary_case(lengths, padding, heads, head_dim)
    qkv, out = qkv.cuda().bfloat16(), out.cuda().bfloat16()
    rotary = Rotary(rotary.positions.cuda(), rotary.cos.cuda(), rotary.sin.cuda())
    segments: Segments = make_segments(lengths, room=50, tiles=False, device="cuda")
    _window_triton(qkv, segments, rotary, out, tiling)
    start = 0
    turned = rotated(qkv, rotary)
    got = out.double().cpu()
    difference = norm = 0.0
    for length in lengths:
        rows = slice(start, start + length)
        expected = dense_reference(turned[rows], [length])
        difference += (got[rows] - expected).square().sum().item()
        norm += expected.square().sum().item()
        start += length
    # Rotated q and k, probabilities and outputs are each rounded to bf16 once, 2^-9 relative at
    # most; a score's error of sqrt(2) * 2^-9 / sqrt(3) enters its weight as it is, for scores are
    # of size one.
    assert math.sqrt(difference / norm) < 2**-9 * 2
    assert out[start:].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("tiling", VARIANTS, ids=str)
def test_variants_on_gpu(tiling: WindowTiling) -> None:
    check_on_gpu(tiling, 80, 16)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [24, 40, 64, 72, 128])
def test_head_sizes_on_gpu(head_dim: int) -> None:
    check_on_gpu(VARIANTS[0], head_dim, 6)
