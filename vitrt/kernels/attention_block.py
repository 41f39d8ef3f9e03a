"""What the attention kernels share: a head in two parts, and the running softmax over its keys.

Shapes: D head size, M query rows and N key rows of a block.

A head is split into two powers of two, MAIN + TAIL: 80 = 64 + 16 costs nothing over the true size,
72 costs 80. Padding it to 128 would cost 1.6 times the matrix products.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from vitrt.kernels.dispatch import jit, pow2_ceil, pow2_floor, tl
from vitrt.kernels.segments import TILE_ROWS, Segments


@dataclass(frozen=True, slots=True)
class WorkList:
    """The blocks of query rows that the programs of an attention kernel share out."""

    entries: Tensor  # `Segments.tiles`, or cu_seqlens where each segment is one block
    count: Tensor  # int32 [1], entries in use
    tile_rows: int  # query rows of an entry; 0 for cu_seqlens
    block_m: int  # query rows of a block
    blocks: int  # that there is room for, a head


def work_list(segments: Segments, block_m: int) -> WorkList:
    """Blocks of `block_m` rows; segments without tiles are one block each, however long."""
    if segments.tiles is None or segments.tile_count is None:
        assert segments.max_seqlen <= TILE_ROWS, "only segments of one tile can do without tiles"
        rows, entries = max(16, pow2_ceil(segments.max_seqlen)), segments.cu_seqlens
        return WorkList(entries, segments.count, 0, rows, entries.numel() - 1)
    tiles = segments.tiles
    blocks = tiles.shape[0] * (TILE_ROWS // block_m)
    return WorkList(tiles, segments.tile_count, TILE_ROWS, block_m, blocks)


def softmax_scale(head_dim: int) -> float:
    """Dh ** -0.5, times log2(e): the kernels' exponentials are to base 2."""
    return head_dim**-0.5 * math.log2(math.e)


def split_head(head_dim: int) -> tuple[int, int]:
    """(MAIN, TAIL), powers of two of at least 16 that cover the head; TAIL is 0 where MAIN does."""
    main = max(16, pow2_floor(head_dim))
    return main, max(16, pow2_ceil(head_dim - main)) if head_dim > main else 0


def split_pairs(head_dim: int) -> tuple[int, int]:
    """(A, B): pairs taken as whole tiles, and the width of the tile for the rest (0 for none)."""
    half = head_dim // 2
    pairs = max(16, pow2_floor(half))
    left = max(half - pairs, 0)
    return pairs, max(16, pow2_ceil(2 * left)) if left else 0


@jit()
def angles(table, row, column, frequency, live, QUARTER: tl.constexpr):
    """Table entries [R, F] of frequencies [1, F] for patches at row and column [R, 1].

    The first QUARTER of the frequencies go by row, the rest by column.
    """
    by_row = frequency < QUARTER
    entry = tl.where(by_row, row, column) * QUARTER
    return tl.load(table + entry + (frequency - tl.where(by_row, 0, QUARTER)), mask=live, other=0.0)


@jit()
def rotate(value, partner, cos, signed_sin):
    """Dims that rotate with `partner`: the lower of a pair subtracts, the upper adds."""
    rotated = value.to(tl.float32) * cos + partner.to(tl.float32) * signed_sin
    return rotated.to(value.dtype)


@jit()
def load_rows(
    at, rows_left, STRIDE: tl.constexpr, ROWS: tl.constexpr, FIRST: tl.constexpr,
    WIDTH: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """[ROWS, WIDTH] at columns FIRST.. of a head; zero beyond the head and beyond `rows_left`."""
    row = tl.arange(0, ROWS)[:, None]
    column = FIRST + tl.arange(0, WIDTH)[None, :]
    pointers = at + row * STRIDE + column
    if FIRST + WIDTH > D:
        return tl.load(pointers, mask=(row < rows_left) & (column < D), other=0.0)
    else:
        return tl.load(pointers, mask=row < rows_left, other=0.0)


@jit()
def store_rows(
    at, values, rows_left, STRIDE: tl.constexpr, ROWS: tl.constexpr, FIRST: tl.constexpr,
    WIDTH: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Write [ROWS, WIDTH] to columns FIRST.. of a head, up to `rows_left`."""
    row = tl.arange(0, ROWS)[:, None]
    column = FIRST + tl.arange(0, WIDTH)[None, :]
    live = (row < rows_left) & (column < D)
    tl.store(at + row * STRIDE + column, values.to(at.dtype.element_ty), mask=live)


@jit()
def attend(
    queries, rows_left, keys, values, length, scale, STRIDE: tl.constexpr, D: tl.constexpr,
    MAIN: tl.constexpr, TAIL: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of M query rows over `length` keys of the same head, at least one.

    Returns [M, MAIN], [M, TAIL] (nothing to use where TAIL is 0), and [M] the logarithm (base 2) of
    the sum of the weights. `scale` includes log2(e).
    """
    q = load_rows(queries, rows_left, STRIDE, M, 0, MAIN, D)
    if TAIL:
        q_tail = load_rows(queries, rows_left, STRIDE, M, MAIN, TAIL, D)
        acc_tail = tl.zeros([M, TAIL], tl.float32)
    acc = tl.zeros([M, MAIN], tl.float32)
    # The running softmax: its maximum (base 2, scaled) and its sum. The maximum is finite from the
    # start, so that it never makes inf - inf.
    peak = tl.full([M], -1e30, tl.float32)
    total = tl.zeros([M], tl.float32)
    for at in tl.range(0, length, N, num_stages=STAGES):
        left = length - at
        k = load_rows(keys, left, STRIDE, N, 0, MAIN, D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if TAIL:
            k_tail = load_rows(keys, left, STRIDE, N, MAIN, TAIL, D)
            scores = tl.dot(q_tail, tl.trans(k_tail), scores, input_precision=PRECISION)
        # The last block stays in the loop: with a masked copy of the body after it, Triton 3.6
        # compiled wrong results on Hopper.
        if left < N:
            scores = tl.where(tl.arange(0, N)[None, :] < left, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weights, 1)
        peak = new_peak
        weights = weights.to(q.dtype)
        v = load_rows(values, left, STRIDE, N, 0, MAIN, D)
        acc = tl.dot(weights, v, acc * shrink[:, None], input_precision=PRECISION)
        if TAIL:
            v_tail = load_rows(values, left, STRIDE, N, MAIN, TAIL, D)
            acc_tail = tl.dot(
                weights, v_tail, acc_tail * shrink[:, None], input_precision=PRECISION
            )
        keys += N * STRIDE
        values += N * STRIDE
    inverse = 1.0 / total[:, None]
    main = acc * inverse
    if TAIL:
        return main, acc_tail * inverse, peak + tl.log2(total)
    else:
        return main, main, peak + tl.log2(total)
