"""Attention over short segments, RoPE included, for forwards that wait for launches.

A small image's attention takes a few microseconds, and every kernel before it as many again:
RoPE, and FlashAttention-3's planning of what there is to do. This one rotates q and k on the way.
Each program rotates all keys of its segment anew, so it is for segments of few tiles; window
attention has a kernel that keeps a whole window at hand (window_attention.py).

Shapes: T patches, H heads, Dh head size, M query rows and N key rows of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vitrt.kernels.attention_block import (
    angles,
    rotate,
    softmax_scale,
    split_head,
    split_pairs,
    work_list,
)
from vitrt.kernels.dispatch import dot_precision, jit, tl, use_triton
from vitrt.kernels.segments import TILE_ROWS, Rotary, Segments
from vitrt.kernels.window_attention import window_attention_ref


@jit()
def _rotated(
    at, positions, rows_left, cos, sin, STRIDE: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Rotated rows of a head in three parts, cut as in window_attention.py."""
    HALF: tl.constexpr = D // 2
    QUARTER: tl.constexpr = D // 4
    LEFT: tl.constexpr = HALF - A
    rows = tl.arange(0, ROWS)[:, None]
    within = rows < rows_left
    row = tl.load(positions + 2 * rows, mask=within, other=0)
    column = tl.load(positions + 2 * rows + 1, mask=within, other=0)
    pair = tl.arange(0, A)[None, :]
    live = within & (pair < HALF)
    low = tl.load(at + rows * STRIDE + pair, mask=live, other=0.0)
    high = tl.load(at + rows * STRIDE + pair + HALF, mask=live, other=0.0)
    c = angles(cos, row, column, pair, live, QUARTER)
    s = angles(sin, row, column, pair, live, QUARTER)
    first = rotate(low, high, c, -s)
    second = rotate(high, low, c, s)
    rest = first
    if B:
        index = tl.arange(0, B)[None, :]
        upper = index >= LEFT
        frequency = A + tl.where(upper, index - LEFT, index)
        live = within & (index < 2 * LEFT)
        own = at + rows * STRIDE + frequency + tl.where(upper, HALF, 0)
        other = at + rows * STRIDE + frequency + tl.where(upper, 0, HALF)
        value = tl.load(own, mask=live, other=0.0)
        partner = tl.load(other, mask=live, other=0.0)
        c = angles(cos, row, column, frequency, live, QUARTER)
        s = angles(sin, row, column, frequency, live, QUARTER)
        rest = rotate(value, partner, c, tl.where(upper, s, -s))
    return first, second, rest


# The lists lie anywhere in a packed plan: their alignment must not cost another compilation.
@jit(do_not_specialize=["scale"], do_not_specialize_on_alignment=["work", "count", "positions"])
def _short_kernel(
    qkv, work, count, positions, cos, sin, out, scale, H: tl.constexpr, D: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    TILE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """M query rows of a head a program, over all keys of their segment.

    `work` lists tiles of TILE rows (`Segments.tiles`) or, where TILE is 0, segments of at most M.
    """
    STRIDE: tl.constexpr = 3 * H * D
    PARTS: tl.constexpr = TILE // M if TILE else 1
    head = tl.program_id(1)
    entry = tl.program_id(0) // PARTS
    if TILE:
        first = tl.load(work + 3 * entry) + tl.program_id(0) % PARTS * M
        start = tl.load(work + 3 * entry + 1)
        end = tl.load(work + 3 * entry + 2)
    else:
        first = tl.load(work + entry)
        start = first
        end = tl.load(work + entry + 1)
    if (entry < tl.load(count)) & (first < end):
        queries = qkv + first.to(tl.int64) * STRIDE + head * D
        q_first, q_second, q_rest = _rotated(
            queries, positions + 2 * first, end - first, cos, sin, STRIDE, M, D, A, B
        )
        # The running softmax of attention_block.attend, on rotated parts.
        peak = tl.full([M], -1e30, tl.float32)
        total = tl.zeros([M], tl.float32)
        acc = tl.zeros([M, MAIN], tl.float32)
        if TAIL:
            acc_tail = tl.zeros([M, TAIL], tl.float32)
        keys = qkv + start.to(tl.int64) * STRIDE + (H + head) * D
        places = positions + 2 * start
        length = end - start
        for at in tl.range(0, length, N):
            values = keys + H * D
            left = length - at
            within = tl.arange(0, N)[:, None] < left
            lines = tl.arange(0, N)[:, None] * STRIDE
            column = tl.arange(0, MAIN)[None, :]
            v = tl.load(values + lines + column, mask=within & (column < D), other=0.0)
            if TAIL:
                last = MAIN + tl.arange(0, TAIL)[None, :]
                v_tail = tl.load(values + lines + last, mask=within & (last < D), other=0.0)
            k_first, k_second, k_rest = _rotated(keys, places, left, cos, sin, STRIDE, N, D, A, B)
            scores = tl.dot(q_first, tl.trans(k_first), input_precision=PRECISION)
            scores = tl.dot(q_second, tl.trans(k_second), scores, input_precision=PRECISION)
            if B:
                scores = tl.dot(q_rest, tl.trans(k_rest), scores, input_precision=PRECISION)
            live = tl.arange(0, N)[None, :] < left
            scores = tl.where(live, scores * scale, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(scores, 1))
            weights = tl.exp2(scores - new_peak[:, None])
            shrink = tl.exp2(peak - new_peak)
            total = total * shrink + tl.sum(weights, 1)
            peak = new_peak
            weights = weights.to(v.dtype)
            acc = tl.dot(weights, v, acc * shrink[:, None], input_precision=PRECISION)
            if TAIL:
                acc_tail = tl.dot(
                    weights, v_tail, acc_tail * shrink[:, None], input_precision=PRECISION
                )
            keys += N * STRIDE
            places += 2 * N
        inverse = 1.0 / total[:, None]
        live_row = tl.arange(0, M)[:, None] < end - first
        target = out + first.to(tl.int64) * (H * D) + head * D
        lines = tl.arange(0, M)[:, None] * (H * D)
        column = tl.arange(0, MAIN)[None, :]
        result = (acc * inverse).to(out.dtype.element_ty)
        tl.store(target + lines + column, result, mask=live_row & (column < D))
        if TAIL:
            last = MAIN + tl.arange(0, TAIL)[None, :]
            result = (acc_tail * inverse).to(out.dtype.element_ty)
            tl.store(target + lines + last, result, mask=live_row & (last < D))


@dataclass(frozen=True, slots=True)
class ShortTiling:
    """The kernel's block sizes, and how Triton compiles it."""

    block_m: int  # query rows, a divisor of TILE_ROWS
    block_n: int  # key rows
    warps: int


# For scripts that search; the first is the default.
VARIANTS = (
    ShortTiling(64, 32, 4),
    ShortTiling(32, 32, 2),
    ShortTiling(32, 32, 4),
    ShortTiling(32, 64, 4),
    ShortTiling(64, 64, 4),
    ShortTiling(64, 64, 8),
    ShortTiling(64, 128, 8),
    ShortTiling(128, 64, 8),
)


def _short_triton(
    qkv: Tensor, segments: Segments, rotary: Rotary, out: Tensor, tiling: ShortTiling = VARIANTS[0]
) -> Tensor:
    assert qkv.is_contiguous() and out.is_contiguous()
    _, _, heads, head_dim = qkv.shape
    main, tail = split_head(head_dim)
    pairs, rest = split_pairs(head_dim)
    work = work_list(segments, tiling.block_m)
    warps = tiling.warps if work.tile_rows else 8 if work.block_m == TILE_ROWS else 4
    _short_kernel[(work.blocks, heads)](
        qkv, work.entries, work.count, rotary.positions, rotary.cos, rotary.sin, out,
        softmax_scale(head_dim), heads, head_dim, pairs, rest, main, tail, work.tile_rows,
        work.block_m, tiling.block_n, dot_precision(qkv), num_warps=warps, num_stages=1,
    )  # fmt: skip
    return out


def short_attention(qkv: Tensor, segments: Segments, rotary: Rotary, out: Tensor) -> Tensor:
    """RoPE, then attention within each segment, scaled by Dh ** -0.5.

    qkv [T, 3, H, Dh] contiguous and unrotated (it is left so), Dh a multiple of 8 up to 128. Writes
    the rows of `segments` into out [T, H * Dh] and returns it. Segments without tiles must have at
    most 128 rows.
    """
    if use_triton(qkv):
        return _short_triton(qkv, segments, rotary, out)
    return window_attention_ref(qkv, segments, rotary, out)
