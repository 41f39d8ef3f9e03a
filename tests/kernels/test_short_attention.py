"""Attention over short segments: the interpreter in float32 here, bfloat16 on a GPU."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.support.attention_cases import dense_reference, make_segments, rotary_case, rotated
from tests.support.interpreter import interpreted
from vitrt.kernels.segments import Rotary, tile_list
from vitrt.kernels.short_attention import VARIANTS, ShortTiling, _short_triton, short_attention

PLAIN = ShortTiling(64, 32, 4)


@interpreted
@pytest.mark.parametrize("tiled", [True, False])
@pytest.mark.parametrize("head_dim", [8, 24, 64, 72, 80, 128])
def test_kernel_equals_dense(head_dim: int, tiled: bool) -> None:
    lengths = [5, 70, 1, 33]
    qkv, rotary, out = rotary_case(lengths, 6, 2, head_dim)
    before = qkv.clone()
    _short_triton(qkv, make_segments(lengths, room=3, tiles=tiled), rotary, out, PLAIN)
    tokens = sum(lengths)
    expected = dense_reference(rotated(qkv, rotary), lengths)
    # float32 throughout: rounding over 70 keys of at most 128 products stays well under this.
    torch.testing.assert_close(out[:tokens].double(), expected, rtol=1e-5, atol=1e-5)
    assert out[tokens:].isnan().all(), "rows outside every segment are left unwritten"
    assert torch.equal(qkv.nan_to_num(), before.nan_to_num()), "qkv is only read"


@interpreted
@pytest.mark.parametrize("tiling", [ShortTiling(32, 32, 2), ShortTiling(128, 64, 8)], ids=str)
def test_segments_of_several_tiles(tiling: ShortTiling) -> None:
    lengths = [300, 129]
    qkv, rotary, out = rotary_case(lengths, 0, 1, 72)
    _short_triton(qkv, make_segments(lengths), rotary, out, tiling)
    expected = dense_reference(rotated(qkv, rotary), lengths)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@interpreted
def test_replay_with_other_boundaries() -> None:
    """A graph replays the launch: only what the tensors hold may change."""
    first, second = [64, 40], [20, 8, 60]
    qkv, rotary, out = rotary_case(first, 0, 2, 40)
    segments = make_segments(first, room=3)
    assert segments.tiles is not None and segments.tile_count is not None
    _short_triton(qkv, segments, rotary, out, PLAIN)
    tiles = torch.from_numpy(tile_list(np.cumsum([0, *second]).astype(np.int32)))
    segments.tiles[: len(tiles)] = tiles
    segments.tile_count.fill_(len(tiles))
    _short_triton(qkv, replace(segments, lengths=()), rotary, out.fill_(math.nan), PLAIN)
    expected = dense_reference(rotated(qkv, rotary), second)
    torch.testing.assert_close(out[:88].double(), expected, rtol=1e-5, atol=1e-5)
    assert out[88:].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 72, 80, 128])
@pytest.mark.parametrize("tiling", VARIANTS, ids=str)
def test_variants_on_gpu(tiling: ShortTiling, head_dim: int) -> None:
    lengths, padding = [16, 196, 4, 300], 40
    qkv, rotary, out = rotary_case(lengths, padding, 6, head_dim)
    qkv, out = qkv.cuda().bfloat16(), out.cuda().bfloat16()
    rotary = Rotary(rotary.positions.cuda(), rotary.cos.cuda(), rotary.sin.cuda())
    segments = make_segments(lengths, room=5, device="cuda")
    _short_triton(qkv, segments, rotary, out, tiling)
    tokens = sum(lengths)
    expected = dense_reference(rotated(qkv, rotary), lengths)
    error = (out[:tokens].double().cpu() - expected).norm() / expected.norm()
    # As the window kernel's: rotated q and k, probabilities and outputs rounded once each.
    assert error < 2**-9 * 2
    assert out[tokens:].isnan().all()
    again = short_attention(qkv, segments, rotary, torch.empty_like(out))
    assert (again[:tokens].double().cpu() - expected).norm() / expected.norm() < 2**-9 * 2
