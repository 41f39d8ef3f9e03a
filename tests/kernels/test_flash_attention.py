"""The full-attention kernel, by the interpreter in float32, or on a GPU in bfloat16.

tests/attention/test_attention.py compares it with the other backends.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import vitrt.kernels.flash_attention as flash_attention_file
from tests.support.attention_cases import dense_reference, make_segments, poisoned
from tests.support.interpreter import interpreted
from vitrt.kernels.attention_block import split_head
from vitrt.kernels.flash_attention import (
    VARIANTS,
    FlashTiling,
    _flash_triton,
    flash_attention,
    flash_attention_ref,
)
from vitrt.kernels.segments import TILE_ROWS, Segments, tile_list

SMALL = FlashTiling(64, 32, 4, 2, 1)


@interpreted
@pytest.mark.parametrize("head_dim", [8, 24, 40, 64, 72, 80, 128])
@pytest.mark.parametrize("lengths", [[1], [33, 5, 64], [130, 3]], ids=str)
def test_kernel_equals_dense(head_dim: int, lengths: list[int]) -> None:
    qkv, out = poisoned(lengths, 6, 2, head_dim)
    _flash_triton(qkv, make_segments(lengths, room=3), out, SMALL)
    tokens = sum(lengths)
    # float32 throughout: rounding over at most 130 keys of 128 products stays well under this.
    torch.testing.assert_close(
        out[:tokens].double(), dense_reference(qkv, lengths), rtol=1e-5, atol=1e-5
    )
    assert out[tokens:].isnan().all(), "rows outside every segment are left unwritten"


@interpreted
def test_twelve_heads_of_64() -> None:
    """The head count of Qwen3.5-0.8B: no power of two, nor a multiple of 8."""
    lengths = [70, 36]
    qkv, out = poisoned(lengths, 2, 12, 64)
    _flash_triton(qkv, make_segments(lengths), out, SMALL)
    torch.testing.assert_close(
        out[:106].double(), dense_reference(qkv, lengths), rtol=1e-5, atol=1e-5
    )


@interpreted
@pytest.mark.parametrize("tiling", sorted({(v.block_m, v.block_n) for v in VARIANTS}), ids=str)
def test_every_block_size(tiling: tuple[int, int]) -> None:
    lengths = [200, 64, 7]
    qkv, out = poisoned(lengths, 2, 1, 72)
    _flash_triton(qkv, make_segments(lengths), out, FlashTiling(*tiling, 4, 2, 1))
    torch.testing.assert_close(
        out[:271].double(), dense_reference(qkv, lengths), rtol=1e-5, atol=1e-5
    )


@interpreted
@pytest.mark.parametrize("lengths", [[64, 16, 4], [100, 7]], ids=str)
def test_windows_without_tiles(lengths: list[int]) -> None:
    qkv, out = poisoned(lengths, 3, 2, 40)
    _flash_triton(qkv, make_segments(lengths, room=2, tiles=False), out, SMALL)
    tokens = sum(lengths)
    torch.testing.assert_close(
        out[:tokens].double(), dense_reference(qkv, lengths), rtol=1e-5, atol=1e-5
    )
    assert out[tokens:].isnan().all()


@interpreted
def test_replay_with_other_boundaries() -> None:
    """A graph replays the launch: only what the tensors hold may change."""
    first, second = [90, 38], [10, 70, 40]
    qkv, out = poisoned(first, 8, 2, 40)
    qkv[128:] = torch.randn(8, 3, 2, 40)
    segments = make_segments(first, room=4)
    _flash_triton(qkv, segments, out, SMALL)
    torch.testing.assert_close(
        out[:128].double(), dense_reference(qkv, first), rtol=1e-5, atol=1e-5
    )
    assert segments.tiles is not None
    assert segments.tile_count is not None
    tiles = tile_list(np.concatenate([[0], np.cumsum(second)]))
    segments.tiles[: len(tiles)] = torch.from_numpy(tiles)
    segments.tile_count.fill_(len(tiles))
    stale = replace(segments, lengths=(), max_seqlen=90)  # the host's view is the recorded one's
    _flash_triton(qkv, stale, out.fill_(math.nan), SMALL)
    torch.testing.assert_close(
        out[:120].double(), dense_reference(qkv, second), rtol=1e-5, atol=1e-5
    )
    assert out[120:].isnan().all()


@interpreted
def test_large_scores_do_not_overflow() -> None:
    qkv, out = poisoned([50], 0, 1, 64)
    qkv[:, :2] *= 100.0
    _flash_triton(qkv, make_segments([50]), out, SMALL)
    expected = dense_reference(qkv, [50])
    # Scores reach 1e5, and float32 holds them to 2^-24 * 1e5 = 0.006: that is the error of a
    # weight.
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=0.05)
    assert out.isfinite().all()


def test_reference_is_the_cpu_path() -> None:
    lengths = [9, 4, 30]
    qkv, out = poisoned(lengths, 5, 2, 24)
    if torch.cuda.is_available():
        flash_attention_ref(qkv, make_segments(lengths), out)
    else:
        flash_attention(qkv, make_segments(lengths), out)
    torch.testing.assert_close(
        out[:43].double(), dense_reference(qkv, lengths), rtol=1e-5, atol=1e-5
    )
    assert out[43:].isnan().all()


@pytest.mark.parametrize(
    ("head_dim", "parts"),
    [(8, (16, 0)), (24, (16, 16)), (40, (32, 16)), (64, (64, 0)), (72, (64, 16)), (80, (64, 16)),
     (96, (64, 32)), (128, (128, 0))],
)  # fmt: skip
def test_split_head(head_dim: int, parts: tuple[int, int]) -> None:
    assert TILE_ROWS == 128
    assert split_head(head_dim) == parts


@interpreted
def test_few_rows_take_smaller_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_attention_file, "is_hopper", lambda device: True)
    monkeypatch.setattr(flash_attention_file, "processors", lambda device: 132)

    def rows(tokens: int, heads: int, head_dim: int = 72) -> int:
        qkv = torch.empty(tokens, 3, heads, head_dim, dtype=torch.bfloat16)
        return flash_attention_file._tiling(qkv).block_m

    assert [rows(tokens, 16) for tokens in (16, 256, 512, 513, 4096)] == [64, 64, 64, 128, 128]
    assert rows(512, 32) == 128 and rows(513, 8) == 64


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 72, 80, 96])
def test_few_rows_give_the_bits_of_many(head_dim: int) -> None:
    """An image alone and the same in a batch: batch invariance stands on it."""
    lengths = [196, 1, 130, 64]
    qkv, out = poisoned(lengths, 9, 4, head_dim)
    qkv = qkv.cuda().bfloat16()
    segments = make_segments(lengths, room=3, device="cuda")
    few, many = (torch.zeros(*out.shape, device="cuda").bfloat16() for _ in range(2))
    _flash_triton(qkv, segments, few, flash_attention_file._FEW_ROWS)
    _flash_triton(qkv, segments, many, flash_attention_file._MANY_ROWS)
    assert torch.equal(few, many)


@pytest.mark.gpu
@pytest.mark.parametrize("tiling", VARIANTS, ids=str)
@pytest.mark.parametrize("head_dim", [72, 80])
def test_variants_on_gpu(tiling: FlashTiling, head_dim: int) -> None:
    lengths, padding, heads = [1296, 130, 1, 700], 9, 4
    qkv, out = poisoned(lengths, padding, heads, head_dim)
    qkv, out = qkv.cuda().bfloat16(), out.cuda().bfloat16()
    segments: Segments = make_segments(lengths, room=7, device="cuda")
    _flash_triton(qkv, segments, out, tiling)
    tokens = sum(lengths)
    expected = dense_reference(qkv, lengths)
    error = (out[:tokens].double().cpu() - expected).norm() / expected.norm()
    # Probabilities and outputs are rounded to bf16 once each, 2^-9 relative at most.
    assert error < 2**-9 * math.sqrt(2)
    assert out[tokens:].isnan().all()
