"""The kernels for the last query rows: the interpreter in float32 here, bfloat16 on a GPU."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.attention_cases import dense_reference, poisoned
from tests.support.interpreter import interpreted
from vitrt.attention.last_wave import tail_list
from vitrt.kernels.tail_attention import (
    TAIL_ROWS,
    VARIANTS,
    TailRows,
    TailTiling,
    _tail_triton,
    tail_attention,
    tail_attention_ref,
)

SMALL = TailTiling(32, 32, 4, 2, 4)  # 4 splits of the keys for the interpreter's 2 heads


def make_rows(
    lengths: list[int], tails: list[int], *, room: int = 0, device: str = "cpu"
) -> TailRows:
    """The last `tails[i]` rows of each segment, and `room` unused entries, as in a graph."""
    work = tail_list(lengths, np.array(lengths, dtype=np.int32) - np.array(tails, dtype=np.int32))
    unused = np.full((room, 3), 2**30, dtype=np.int32)  # read, these would fault
    return TailRows(
        torch.as_tensor(np.concatenate([work, unused]), device=device),
        torch.tensor([len(work)], dtype=torch.int32, device=device),
    )


def tail_rows(lengths: list[int], tails: list[int]) -> Tensor:
    """Which rows of the segments are tails: bool [sum of lengths]."""
    parts = [
        torch.arange(length) >= length - tail for length, tail in zip(lengths, tails, strict=True)
    ]
    return torch.cat(parts)


def assert_tails(qkv: Tensor, out: Tensor, lengths: list[int], tails: list[int]) -> None:
    """`out` holds the tails' rows, and NaN as before everywhere else."""
    tokens, rows = sum(lengths), tail_rows(lengths, tails)
    # float32 throughout: rounding over some hundred keys of 128 products stays well under this.
    torch.testing.assert_close(
        out[:tokens][rows].double(), dense_reference(qkv, lengths)[rows], rtol=1e-5, atol=1e-5
    )
    assert out[:tokens][~rows].isnan().all(), "rows in whole tiles are the backend's"
    assert out[tokens:].isnan().all(), "rows outside every segment are left unwritten"


@interpreted
@pytest.mark.parametrize("head_dim", [8, 24, 72, 80, 128])
@pytest.mark.parametrize(("lengths", "tails"), [([1], [1]), ([70, 5, 33], [9, 0, 33])], ids=str)
def test_kernels_equal_dense(head_dim: int, lengths: list[int], tails: list[int]) -> None:
    qkv, out = poisoned(lengths, 6, 2, head_dim)
    _tail_triton(qkv, make_rows(lengths, tails, room=2), out, SMALL)
    assert_tails(qkv, out, lengths, tails)


@interpreted
def test_twelve_heads_of_64() -> None:
    lengths, tails = [70, 36], [7, 36]
    qkv, out = poisoned(lengths, 2, 12, 64)
    _tail_triton(qkv, make_rows(lengths, tails), out, SMALL)
    assert_tails(qkv, out, lengths, tails)


@interpreted
@pytest.mark.parametrize("tiling", sorted({(v.block_m, v.block_n) for v in VARIANTS}), ids=str)
def test_every_block_size(tiling: tuple[int, int]) -> None:
    lengths, tails = [200, 64, 7], [100, 0, 5]
    qkv, out = poisoned(lengths, 2, 1, 72)
    _tail_triton(qkv, make_rows(lengths, tails), out, TailTiling(*tiling, 4, 2, 2))
    assert_tails(qkv, out, lengths, tails)


@interpreted
@pytest.mark.parametrize("length", [1, 32, 33, 255, 257])
def test_splits_around_whole_blocks(length: int) -> None:
    """Empty splits, splits of one key, and the last block of each split full or not."""
    qkv, out = poisoned([length, 40], 3, 2, 24)
    _tail_triton(qkv, make_rows([length, 40], [1, 0]), out, SMALL)
    assert_tails(qkv, out, [length, 40], [1, 0])


@interpreted
@pytest.mark.parametrize("tail", [1, 16, 17, 64, 129])
def test_blocks_of_query_rows(tail: int) -> None:
    qkv, out = poisoned([130], 3, 1, 16)
    _tail_triton(qkv, make_rows([130], [tail]), out, SMALL)
    assert_tails(qkv, out, [130], [tail])


@interpreted
@pytest.mark.parametrize("per_processor", [1, 16])
def test_any_number_of_splits(per_processor: int) -> None:
    qkv, out = poisoned([150], 0, 3, 24)
    _tail_triton(qkv, make_rows([150], [20]), out, TailTiling(16, 16, 4, 2, per_processor))
    assert_tails(qkv, out, [150], [20])


@interpreted
def test_nothing_to_do_writes_nothing() -> None:
    qkv, out = poisoned([50], 0, 2, 16)
    _tail_triton(qkv, make_rows([50], [0], room=3), out, SMALL)
    assert out.isnan().all()


@interpreted
def test_replay_with_other_rests() -> None:
    """A graph replays the launch: only what the tensors hold may change."""
    first, second = ([90, 38], [30, 0]), ([10, 70, 40], [0, 6, 3])
    qkv, out = poisoned(first[0], 8, 2, 40)
    qkv[128:] = torch.randn(8, 3, 2, 40)
    rows = make_rows(*first, room=4)
    _tail_triton(qkv, rows, out, SMALL)
    assert_tails(qkv, out, *first)
    other = make_rows(*second)
    rows.entries[: len(other.entries)] = other.entries
    rows.count.copy_(other.count)
    _tail_triton(qkv, rows, out.fill_(math.nan), SMALL)
    assert_tails(qkv, out, *second)


@interpreted
def test_large_scores_do_not_overflow() -> None:
    """One split holds nearly all of the weight, whose scores reach 1e5."""
    qkv, out = poisoned([200], 0, 1, 64)
    qkv[:, :2] *= 100.0
    _tail_triton(qkv, make_rows([200], [7]), out, SMALL)
    expected = dense_reference(qkv, [200])[-7:]
    # float32 holds the scores to 2^-24 * 1e5 = 0.006: that is the error of a weight.
    torch.testing.assert_close(out[-7:].double(), expected, rtol=0, atol=0.05)


def test_reference_is_the_cpu_path() -> None:
    lengths, tails = [9, 84, 30], [2, 70, 0]
    qkv, out = poisoned(lengths, 5, 2, 24)
    rows = make_rows(lengths, tails, room=2)
    if torch.cuda.is_available():
        tail_attention_ref(qkv, rows, out)
    else:
        tail_attention(qkv, rows, out)
    assert_tails(qkv, out, lengths, tails)


def test_entries_are_as_long_as_plans_make_them() -> None:
    assert TAIL_ROWS == 64
    work = tail_list([100, 250], np.array([100, 150], np.int32))
    assert work.tolist() == [[250, 100, 350], [314, 100, 350]]
    assert work.dtype == np.int32
    assert tail_list([9], np.array([9], np.int32)).shape == (0, 3)


@pytest.mark.gpu
@pytest.mark.parametrize("tiling", VARIANTS, ids=str)
@pytest.mark.parametrize("head_dim", [64, 72, 80])
@pytest.mark.parametrize("heads", [4, 16])
def test_variants_on_gpu(tiling: TailTiling, head_dim: int, heads: int) -> None:
    lengths, tails, padding = [1600, 130, 3080], [64, 0, 9], 9
    qkv, out = poisoned(lengths, padding, heads, head_dim)
    qkv, out = qkv.cuda().bfloat16(), out.cuda().bfloat16()
    rows = make_rows(lengths, tails, room=2, device="cuda")
    _tail_triton(qkv, rows, out, tiling)
    tokens, rows = sum(lengths), tail_rows(lengths, tails)
    expected = dense_reference(qkv, lengths)[rows]
    error = (out[:tokens].cpu()[rows].double() - expected).norm() / expected.norm()
    # Probabilities and outputs are rounded to bf16 once each, 2^-9 relative at most.
    assert error < 2**-9 * math.sqrt(2)
    assert out[:tokens].cpu()[~rows].isnan().all()
    assert out[tokens:].isnan().all()
