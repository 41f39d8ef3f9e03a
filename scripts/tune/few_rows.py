"""Kernels for a block of a tower at few rows, for small_image.py: what a small image is bound by is
the number of kernels and the reading of weights, not arithmetic.

    product     a tile of N_TILE columns and one share of K a program, so that even the narrow
                products have as many programs as there are processors. What adds to the residual
                leaves its shares of K apart, in float32
    sum_norm    the residual plus those shares and the bias, and its norm: one kernel
    attention   rotates q and k on the way and takes segments of any length: two kernels fewer than
                RoPE, FlashAttention-3's planning, and itself

With PDL a kernel starts while the one before still runs, and first asks the L2 cache for its
weights, which nobody computes; then it waits. Each of them waits, or an order of three would break.

Shapes: T rows, K input and N output features, S shares of K, D width, H heads, Dh head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitrt.kernels.attention_block import split_head
from vitrt.kernels.dispatch import ceil_div, jit, pow2_ceil, row_tiles, tl
from vitrt.kernels.segments import TILE_ROWS, Rotary, Segments
from vitrt.kernels.window_attention import _angles, _turn, split_pairs


@jit()
def _begin(PDL: tl.constexpr):
    """Let the next kernel start, then wait for the one before."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@jit()
def _prefetch(at):
    """Ask the L2 cache for the 128 bytes at each of these addresses."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False,
        pack=1,
    )  # fmt: skip


@jit(do_not_specialize=["m"])
def _few_rows_kernel(
    x, weight, bias, out, m, N: tl.constexpr, K: tl.constexpr, M_TILE: tl.constexpr,
    N_TILE: tl.constexpr, K_TILE: tl.constexpr, SHARES: tl.constexpr, KIND: tl.constexpr,
    TURNED: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr, PREFETCH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows M_TILE of columns N_TILE of one share of K. TURNED: the weight is the left operand."""
    STEPS: tl.constexpr = (K + K_TILE - 1) // K_TILE
    EACH: tl.constexpr = (STEPS + SHARES - 1) // SHARES * K_TILE
    column = tl.program_id(0) * N_TILE + tl.arange(0, N_TILE)
    row = tl.program_id(1) * M_TILE + tl.arange(0, M_TILE)
    share = tl.program_id(2)
    first = share * EACH
    last = tl.minimum(first + EACH, K)
    step = tl.arange(0, K_TILE)
    # Columns and rows past the end are read again from the start, and not written.
    weight_rows = weight + (column % N).to(tl.int64) * K
    if PREFETCH:
        lines = tl.arange(0, K_TILE // 64) * 64
        for at in tl.range(first, last, K_TILE):
            _prefetch(weight_rows[:, None] + tl.minimum(at + lines, K - 1)[None, :])
    _begin(PDL)
    x_rows = x + (row % m).to(tl.int64) * K
    if TURNED:
        acc = tl.zeros((N_TILE, M_TILE), tl.float32)
    else:
        acc = tl.zeros((M_TILE, N_TILE), tl.float32)
    for at in tl.range(first, last, K_TILE, num_stages=STAGES):
        live = at + step < last
        if TURNED:
            w = tl.load(weight_rows[:, None] + (at + step)[None, :], mask=live[None, :], other=0.0)
            v = tl.load(x_rows[None, :] + (at + step)[:, None], mask=live[:, None], other=0.0)
            acc = tl.dot(w, v, acc, input_precision=PRECISION)
        else:
            v = tl.load(x_rows[:, None] + (at + step)[None, :], mask=live[None, :], other=0.0)
            w = tl.load(weight_rows[None, :] + (at + step)[:, None], mask=live[:, None], other=0.0)
            acc = tl.dot(v, w, acc, input_precision=PRECISION)
    if TURNED:
        acc = tl.trans(acc)
    if KIND != "shares":
        acc += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    live_row = (row < m)[:, None]
    target = out + (share * m + row).to(tl.int64)[:, None] * N + column[None, :]
    live = live_row & (column < N)[None, :]
    if KIND == "swiglu":
        gate, up = tl.split(tl.reshape(acc, (M_TILE, N_TILE // 2, 2)))
        acc = gate / (1.0 + tl.exp(-gate)) * up
        half = tl.program_id(0) * (N_TILE // 2) + tl.arange(0, N_TILE // 2)
        target = out + row.to(tl.int64)[:, None] * (N // 2) + half[None, :]
        live = live_row & (half < N // 2)[None, :]
    if KIND == "gelu":
        acc = 0.5 * acc * (1.0 + tl.erf(acc * 0.7071067811865476))
    if KIND == "quick_gelu":
        acc = acc / (1.0 + tl.exp(-1.702 * acc))
    if KIND == "gelu_tanh":
        acc = acc / (1.0 + tl.exp(-1.5957691216057308 * (acc + 0.044715 * acc * acc * acc)))
    tl.store(target, acc.to(out.dtype.element_ty), mask=live)


@dataclass(frozen=True, slots=True)
class Shape:
    """A product's tiles, and how Triton compiles it."""

    m: int
    n: int
    k: int
    shares: int = 1
    turned: bool = False
    warps: int = 4
    stages: int = 3

    def __str__(self) -> str:
        turned = "t" if self.turned else ""
        return f"{self.m}x{self.n}x{self.k}{turned}/{self.shares} w{self.warps}s{self.stages}"


# (M_TILE, N_TILE, turned, warps) that are tried at up to so many rows.
_TRIED = (
    (16, ((16, 64, True, 4), (16, 128, True, 4), (16, 32, False, 4), (16, 64, False, 4))),
    (64, ((64, 32, False, 4), (64, 64, False, 4), (64, 64, True, 4), (64, 128, True, 8))),
    (256, ((64, 64, False, 4), (64, 128, False, 4), (128, 64, False, 8), (128, 64, True, 4),
           (256, 64, True, 8))),
)  # fmt: skip


def candidates(kind: str, m: int, n: int, processors: int) -> list[Shape]:
    """Shapes worth a try; shares of K where they give every processor a program or two."""
    tiles = next((tried for rows, tried in _TRIED if m <= rows), _TRIED[-1][1])
    found = []
    for m_tile, n_tile, turned, warps in tiles:
        programs = ceil_div(n, n_tile) * ceil_div(m, m_tile)
        shares = [s for s in (1, 2, 3, 4, 6, 8) if 0.7 <= programs * s / processors <= 2.3]
        for share in (shares or [1]) if kind == "shares" else [1]:
            found += [
                Shape(m_tile, n_tile, k_tile, share, turned, warps, stages)
                for k_tile, stages in ((64, 4), (128, 3))
            ]
    return found


def product(
    kind: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shape: Shape,
    *,
    pdl: bool = False,
    prefetch: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """act(x [T, K] weight [N, K]^T + bias) in x's dtype, [T, N] or, for swiglu, [T, N / 2].

    It goes into `out` where that is given, rows contiguous.

    "shares": float32 [S, T, N], whose sum over S is x weight^T.
    """
    assert x.is_contiguous() and weight.is_contiguous()
    (m, k), n = x.shape, weight.shape[0]
    if kind == "shares":
        out = torch.empty(shape.shares, m, n, dtype=torch.float32, device=x.device)
    elif out is None:
        out = x.new_empty(m, n // 2 if kind == "swiglu" else n)
    assert out.is_contiguous() and (kind == "shares" or (shape.shares == 1 and bias is not None))
    options: dict[str, Any] = {"launch_pdl": True} if pdl else {}
    _few_rows_kernel[(ceil_div(n, shape.n), ceil_div(m, shape.m), shape.shares)](
        x, weight, bias, out, m, n, k, shape.m, shape.n, shape.k, shape.shares, kind,
        shape.turned, shape.stages, pdl, prefetch,
        "ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=shape.warps, num_stages=shape.stages, **options,
    )  # fmt: skip
    return out


@jit()
def _sum(shares, bias, residual, row, columns, m, D: tl.constexpr, SHARES: tl.constexpr):
    """The new residual of some columns of a row, which is written."""
    mask = columns < D
    at = row.to(tl.int64) * D + columns
    values = tl.load(residual + at, mask=mask, other=0.0)
    added = tl.load(bias + columns, mask=mask, other=0.0).to(tl.float32)
    for share in tl.static_range(SHARES):
        added += tl.load(shares + share * m.to(tl.int64) * D + at, mask=mask, other=0.0)
    values += added
    tl.store(residual + at, values, mask=mask)
    return values


@jit(do_not_specialize=["m"])
def _sum_norm_kernel(
    shares, bias, residual, weight, norm_bias, out, m, eps, D: tl.constexpr, MAIN: tl.constexpr,
    TAIL: tl.constexpr, SHARES: tl.constexpr, CENTRE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row a program, in two parts as in vitrt/kernels/norm.py."""
    row = tl.program_id(0)
    main = tl.arange(0, MAIN)
    scale = tl.load(weight + main, mask=main < D, other=0.0).to(tl.float32)
    shift = scale
    if CENTRE:
        shift = tl.load(norm_bias + main, mask=main < D, other=0.0).to(tl.float32)
    if TAIL:
        tail = MAIN + tl.arange(0, TAIL)
        tail_scale = tl.load(weight + tail, mask=tail < D, other=0.0).to(tl.float32)
        tail_shift = tail_scale
        if CENTRE:
            tail_shift = tl.load(norm_bias + tail, mask=tail < D, other=0.0).to(tl.float32)
    _begin(PDL)
    values = _sum(shares, bias, residual, row, main, m, D, SHARES)
    total = tl.sum(values, 0)
    if TAIL:
        rest = _sum(shares, bias, residual, row, tail, m, D, SHARES)
        total += tl.sum(rest, 0)
    if CENTRE:
        mean = total / D
        values = tl.where(main < D, values - mean, 0.0)
        if TAIL:
            rest = tl.where(tail < D, rest - mean, 0.0)
    squares = tl.sum(values * values, 0)
    if TAIL:
        squares += tl.sum(rest * rest, 0)
    inverse = tl.rsqrt(squares / D + eps)
    at = row.to(tl.int64) * D
    values = values * inverse * scale
    if CENTRE:
        values += shift
    tl.store(out + at + main, values.to(out.dtype.element_ty), mask=main < D)
    if TAIL:
        rest = rest * inverse * tail_scale
        if CENTRE:
            rest += tail_shift
        tl.store(out + at + tail, rest.to(out.dtype.element_ty), mask=tail < D)


def sum_norm(
    shares: Tensor,
    bias: Tensor,
    residual: Tensor,
    weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    *,
    warps: int = 4,
    pdl: bool = False,
) -> Tensor:
    """residual [T, D] += bias + the sum of shares [S, T, D], in place; returns its norm."""
    count, m, width = shares.shape
    assert residual.is_contiguous() and residual.dtype == torch.float32
    out = torch.empty(m, width, dtype=weight.dtype, device=weight.device)
    main, tail, _ = row_tiles(width)
    options: dict[str, Any] = {"launch_pdl": True} if pdl else {}
    _sum_norm_kernel[(m,)](
        shares, bias, residual, weight, norm_bias, out, m, eps, width, main, tail, count,
        norm_bias is not None, pdl, num_warps=warps, **options,
    )  # fmt: skip
    return out


@jit()
def _turned(
    at, positions, rows_left, cos, sin, STRIDE: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Rotated rows of a head in three parts, cut as in vitrt/kernels/window_attention.py."""
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
    c = _angles(cos, row, column, pair, live, QUARTER)
    s = _angles(sin, row, column, pair, live, QUARTER)
    first = _turn(low, high, c, -s)
    second = _turn(high, low, c, s)
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
        c = _angles(cos, row, column, frequency, live, QUARTER)
        s = _angles(sin, row, column, frequency, live, QUARTER)
        rest = _turn(value, partner, c, tl.where(upper, s, -s))
    return first, second, rest


@jit(
    do_not_specialize=["scale"],
    do_not_specialize_on_alignment=["tiles", "count", "positions"],
)
def _small_attention_kernel(
    qkv, tiles, count, positions, cos, sin, out, scale, H: tl.constexpr, D: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    TILE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PDL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """M query rows of a head a program, over all keys of their segment; TILE: _flash_kernel's."""
    STRIDE: tl.constexpr = 3 * H * D
    PARTS: tl.constexpr = TILE // M if TILE else 1
    head = tl.program_id(1)
    tile = tl.program_id(0) // PARTS
    entries = tl.load(count)
    if TILE:
        first = tl.load(tiles + 3 * tile) + tl.program_id(0) % PARTS * M
        start = tl.load(tiles + 3 * tile + 1)
        end = tl.load(tiles + 3 * tile + 2)
    else:
        first = tl.load(tiles + tile)
        start = first
        end = tl.load(tiles + tile + 1)
    _begin(PDL)
    if (tile < entries) & (first < end):
        queries = qkv + first.to(tl.int64) * STRIDE + head * D
        q_first, q_second, q_rest = _turned(
            queries, positions + 2 * first, end - first, cos, sin, STRIDE, M, D, A, B
        )
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
            k_first, k_second, k_rest = _turned(keys, places, left, cos, sin, STRIDE, N, D, A, B)
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


def attention(
    qkv: Tensor,
    segments: Segments,
    rotary: Rotary,
    *,
    rows: int = 64,
    keys: int = 64,
    warps: int = 4,
    pdl: bool = False,
) -> Tensor:
    """Rotary embedding and attention of qkv [T, 3, H, Dh], which is left as it is; [T, H * Dh].

    Rows outside of every segment are not written.
    """
    _, _, heads, head_dim = qkv.shape
    out = qkv.new_empty(qkv.shape[0], heads * head_dim)
    main, tail = split_head(head_dim)
    pairs, rest = split_pairs(head_dim)
    if segments.tiles is None or segments.tile_count is None:
        assert segments.max_seqlen <= TILE_ROWS
        work, count, tile = segments.cu_seqlens, segments.count, 0
        rows = max(16, pow2_ceil(segments.max_seqlen))
        programs = work.numel() - 1
    else:
        work, count, tile = segments.tiles, segments.tile_count, TILE_ROWS
        programs = work.shape[0] * (TILE_ROWS // rows)
    options: dict[str, Any] = {"launch_pdl": True} if pdl else {}
    _small_attention_kernel[(programs, heads)](
        qkv, work, count, rotary.positions, rotary.cos, rotary.sin, out,
        head_dim**-0.5 * math.log2(math.e), heads, head_dim, pairs, rest, main, tail, tile,
        rows, keys, pdl, "ieee" if qkv.dtype == torch.float32 else "tf32",
        num_warps=warps, num_stages=1, **options,
    )  # fmt: skip
    return out
