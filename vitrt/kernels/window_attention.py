"""Attention inside windows of at most 64 patches, RoPE included: one read and one write.

Shapes: T patches, H heads, Dh head size.

A varlen flash kernel is bound here by everything but its products: 64-row tiles hide no latency,
and RoPE as a kernel of its own reads and writes q and k once more. This one is meant to run at the
speed of a copy.

Rotation pairs dimension i with i + Dh/2. The order of dimensions is free as long as q and k agree,
so the head is cut into LOW = dims [0, A), HIGH = dims [Dh/2, Dh/2 + A), where pairs are two whole
tiles, and REST, the B dims left over, which fetches its partners a second time (from L1). 80 = 32 +
32 + 16 and 72 = 32 + 32 + 8: nothing is padded to 128.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from vitrt.kernels.attention_block import angles, rotate, softmax_scale, split_head, split_pairs
from vitrt.kernels.dispatch import dot_precision, jit, tl, use_triton
from vitrt.kernels.flash_attention import flash_attention_ref
from vitrt.kernels.persistent import is_hopper, programs
from vitrt.kernels.rope import rope_ref
from vitrt.kernels.segments import Rotary, Segments

WINDOW = 64  # rows of a program's tile


# The boundaries lie anywhere in a packed plan: their alignment must not cost another compilation.
@jit(do_not_specialize=["scale"], do_not_specialize_on_alignment=["cu_seqlens", "count"])
def _window_kernel(
    qkv, cu_seqlens, count, positions, cos, sin, out, scale, H: tl.constexpr, D: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    HEADS: tl.constexpr, KEEP: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Programs stride over (window, group of HEADS heads).

    A group shares its angles: in registers if KEEP, else from L1 for each head, which leaves room
    for more programs on a multiprocessor.
    """
    STRIDE: tl.constexpr = 3 * H * D
    HALF: tl.constexpr = D // 2
    QUARTER: tl.constexpr = D // 4
    GROUPS: tl.constexpr = H // HEADS
    ROWS: tl.constexpr = 64
    rows = tl.arange(0, ROWS)[:, None]
    pair = tl.arange(0, A)[None, :]
    pair_offset = rows * STRIDE + pair
    if B:
        # Dims HALF - LEFT .. HALF - 1, then D - LEFT .. D - 1, each with its partner.
        LEFT: tl.constexpr = HALF - A
        rest = tl.arange(0, B)[None, :]
        upper = rest >= LEFT
        rest_frequency = A + tl.where(upper, rest - LEFT, rest)
        rest_offset = rows * STRIDE + rest_frequency + tl.where(upper, HALF, 0)
        rest_partner = rows * STRIDE + rest_frequency + tl.where(upper, 0, HALF)
    work = tl.load(count) * GROUPS
    for item in tl.range(tl.program_id(0), work, tl.num_programs(0)):
        window = item // GROUPS
        first_head = item % GROUPS * HEADS
        start = tl.load(cu_seqlens + window)
        length = tl.load(cu_seqlens + window + 1) - start
        in_window = rows < length
        row = tl.load(positions + 2 * start + 2 * rows, mask=in_window, other=0)
        column = tl.load(positions + 2 * start + 2 * rows + 1, mask=in_window, other=0)
        live = in_window & (pair < HALF)
        if KEEP:
            pair_cos = angles(cos, row, column, pair, live, QUARTER)
            pair_sin = angles(sin, row, column, pair, live, QUARTER)
        if B:
            live_rest = in_window & (rest < 2 * LEFT)
            if KEEP:
                rest_cos = angles(cos, row, column, rest_frequency, live_rest, QUARTER)
                rest_sin = angles(sin, row, column, rest_frequency, live_rest, QUARTER)
                rest_sin = tl.where(upper, rest_sin, -rest_sin)
        at = qkv + start.to(tl.int64) * STRIDE + first_head * D
        target = out + start.to(tl.int64) * (H * D) + first_head * D
        for _ in tl.range(0, HEADS, num_stages=STAGES):
            key_at = at + H * D
            value_at = at + 2 * H * D
            column_main = tl.arange(0, MAIN)[None, :]
            live_main = in_window & (column_main < D)
            # All loads stand before the first use of any: together they hide each other's latency.
            v = tl.load(value_at + rows * STRIDE + column_main, mask=live_main, other=0.0)
            if TAIL:
                column_tail = MAIN + tl.arange(0, TAIL)[None, :]
                live_tail = in_window & (column_tail < D)
                v_tail = tl.load(value_at + rows * STRIDE + column_tail, mask=live_tail, other=0.0)
            q_low = tl.load(at + pair_offset, mask=live, other=0.0)
            q_high = tl.load(at + pair_offset + HALF, mask=live, other=0.0)
            k_low = tl.load(key_at + pair_offset, mask=live, other=0.0)
            k_high = tl.load(key_at + pair_offset + HALF, mask=live, other=0.0)
            if B:
                q_rest = tl.load(at + rest_offset, mask=live_rest, other=0.0)
                q_partner = tl.load(at + rest_partner, mask=live_rest, other=0.0)
                k_rest = tl.load(key_at + rest_offset, mask=live_rest, other=0.0)
                k_partner = tl.load(key_at + rest_partner, mask=live_rest, other=0.0)
                if not KEEP:
                    rest_cos = angles(cos, row, column, rest_frequency, live_rest, QUARTER)
                    rest_sin = angles(sin, row, column, rest_frequency, live_rest, QUARTER)
                    rest_sin = tl.where(upper, rest_sin, -rest_sin)
            if not KEEP:
                pair_cos = angles(cos, row, column, pair, live, QUARTER)
                pair_sin = angles(sin, row, column, pair, live, QUARTER)
            q_first = rotate(q_low, q_high, pair_cos, -pair_sin)
            q_second = rotate(q_high, q_low, pair_cos, pair_sin)
            # The selects are always true. Triton would rather move the raw values, cos and sin into
            # the layout of an operand and rotate them there, with the angles in registers twice; a
            # select stops it. For k it costs nothing on Hopper, whose products read k from shared
            # memory; elsewhere it takes 255 registers and a spill down to 180.
            q_first = tl.where(pair < D, q_first, 0.0)
            q_second = tl.where(pair < D, q_second, 0.0)
            k_first = rotate(k_low, k_high, pair_cos, -pair_sin)
            k_second = rotate(k_high, k_low, pair_cos, pair_sin)
            k_first = tl.where(pair < D, k_first, 0.0)
            k_second = tl.where(pair < D, k_second, 0.0)
            if B:
                q_rest = rotate(q_rest, q_partner, rest_cos, rest_sin)
                q_rest = tl.where(rest < D, q_rest, 0.0)
                k_rest = rotate(k_rest, k_partner, rest_cos, rest_sin)
                k_rest = tl.where(rest < D, k_rest, 0.0)
            scores = tl.dot(q_first, tl.trans(k_first), input_precision=PRECISION)
            scores = tl.dot(q_second, tl.trans(k_second), scores, input_precision=PRECISION)
            if B:
                scores = tl.dot(q_rest, tl.trans(k_rest), scores, input_precision=PRECISION)
            keys = tl.arange(0, ROWS)[None, :]
            scores = tl.where(keys < length, scores * scale, float("-inf"))
            weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
            inverse = 1.0 / tl.sum(weights, 1)[:, None]
            weights = weights.to(qkv.dtype.element_ty)
            result = tl.dot(weights, v, input_precision=PRECISION)
            if TAIL:
                result_tail = tl.dot(weights, v_tail, input_precision=PRECISION)
            result = (result * inverse).to(out.dtype.element_ty)
            tl.store(target + rows * (H * D) + column_main, result, mask=live_main)
            if TAIL:
                result_tail = (result_tail * inverse).to(out.dtype.element_ty)
                tl.store(target + rows * (H * D) + column_tail, result_tail, mask=live_tail)
            at += D
            target += D


@dataclass(frozen=True, slots=True)
class WindowTiling:
    """The kernel's block sizes, and how Triton compiles it."""

    heads: int  # that a program does in turn; a power of two, lowered to one that divides H
    keep: bool  # hold the angles in registers from head to head
    warps: int
    stages: int  # software pipeline over a program's heads, or over its windows where heads is 1
    per_processor: int  # programs resident on a multiprocessor; many: the hardware schedules them
    registers: int | None = None  # at most these for a thread


# For scripts that search; the first is the default.
VARIANTS = (
    WindowTiling(1, False, 4, 1, 4, 128),
    WindowTiling(1, False, 4, 1, 512, 128),
    WindowTiling(1, False, 4, 1, 5, 96),
    WindowTiling(1, False, 4, 2, 2),
    WindowTiling(2, False, 4, 1, 4, 128),
    WindowTiling(2, True, 4, 1, 3, 168),
    WindowTiling(4, False, 4, 1, 4, 128),
    WindowTiling(4, True, 4, 1, 3, 168),
    WindowTiling(4, True, 4, 1, 4, 128),
    WindowTiling(4, True, 4, 2, 3, 168),
    WindowTiling(8, True, 4, 2, 3, 168),
    WindowTiling(16, True, 4, 2, 3, 168),
    WindowTiling(4, True, 8, 2, 2, 128),
    WindowTiling(1, False, 8, 1, 2, 128),
)

_ROOMY = WindowTiling(1, False, 4, 1, 2)  # for where 128 registers are too few


def _window_triton(
    qkv: Tensor, segments: Segments, rotary: Rotary, out: Tensor, tiling: WindowTiling | None = None
) -> Tensor:
    assert qkv.is_contiguous() and out.is_contiguous()
    assert segments.max_seqlen <= WINDOW, "longer segments are for flash_attention"
    _, _, heads, head_dim = qkv.shape
    if tiling is None:
        tight = is_hopper(qkv.device) and head_dim <= 80 and qkv.itemsize == 2
        tiling = VARIANTS[0] if tight else _ROOMY
    main, tail = split_head(head_dim)
    pairs, rest = split_pairs(head_dim)
    group = math.gcd(heads, tiling.heads)
    items = (segments.cu_seqlens.numel() - 1) * (heads // group)
    options = {} if tiling.registers is None else {"maxnreg": tiling.registers}
    _window_kernel[(programs(items, tiling.per_processor, qkv.device),)](
        qkv, segments.cu_seqlens, segments.count, rotary.positions, rotary.cos, rotary.sin, out,
        softmax_scale(head_dim), heads, head_dim, pairs, rest, main, tail, group,
        tiling.keep, tiling.stages, dot_precision(qkv),
        num_warps=tiling.warps, num_stages=tiling.stages, **options,
    )  # fmt: skip
    return out


def window_attention_ref(qkv: Tensor, segments: Segments, rotary: Rotary, out: Tensor) -> Tensor:
    """RoPE in float32, rounded once, then attention within each window in float32, rounded once."""
    rotated = qkv.clone()
    rope_ref(rotated, rotary)
    return flash_attention_ref(rotated, segments, out)


def window_attention(qkv: Tensor, segments: Segments, rotary: Rotary, out: Tensor) -> Tensor:
    """RoPE, then attention within windows of at most 64 patches, scaled by Dh ** -0.5.

    qkv [T, 3, H, Dh] contiguous and unrotated (it is left so), Dh a multiple of 8 up to 128. Writes
    the rows of `segments` into out [T, H * Dh] and returns it. ValueError for a longer segment.
    """
    if segments.max_seqlen > WINDOW:
        raise ValueError(
            f"window attention takes segments of at most {WINDOW} patches, "
            f"got {segments.max_seqlen}"
        )
    if use_triton(qkv):
        return _window_triton(qkv, segments, rotary, out)
    return window_attention_ref(qkv, segments, rotary, out)
