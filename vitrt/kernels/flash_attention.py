"""Variable-length attention for full layers, over the packed qkv without copying it.

Shapes: T patches, H heads, Dh head size, C entries of the work list, M query rows and N key rows of
a block.

The head is split into two powers of two, MAIN + TAIL: 80 = 64 + 16 costs nothing over the true
size, 72 costs 80. Padding it to 128 would cost 1.6 times the matrix products.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vitrt.kernels.dispatch import jit, pow2_ceil, pow2_floor, tl, use_triton
from vitrt.kernels.persistent import is_hopper, programs

if TYPE_CHECKING:  # attention imports kernels, never the other way round
    from vitrt.attention.base import Segments

_TILE_ROWS = 128  # query rows of an entry of Segments.tiles, attention.base.TILE_ROWS


@jit()
def _load_rows(
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


# The work list lies anywhere in a packed plan: its alignment must not cost another compilation.
@jit(do_not_specialize=["scale"], do_not_specialize_on_alignment=["tiles", "count"])
def _flash_kernel(
    qkv, tiles, count, out, scale, H: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr,
    TAIL: tl.constexpr, TILE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention by persistent programs, which stride over (tile, M rows of it, head).

    `tiles` [C, 3] holds (first query row, segment start, segment end); with TILE = 0 it is
    cu_seqlens and each segment is one tile. Entries past `count` cost nothing. The heads of a tile
    are neighbours in the order of work: their rows of k and v are neighbours in memory.
    """
    STRIDE: tl.constexpr = 3 * H * D
    PARTS: tl.constexpr = TILE // M if TILE else 1
    work = tl.load(count) * (PARTS * H)
    for item in tl.range(tl.program_id(0), work, tl.num_programs(0)):
        head = item % H
        part = item // H % PARTS
        tile = item // (H * PARTS)
        if TILE:
            first = tl.load(tiles + 3 * tile) + part * M
            start = tl.load(tiles + 3 * tile + 1)
            end = tl.load(tiles + 3 * tile + 2)
        else:
            first = tl.load(tiles + tile)
            start = first
            end = tl.load(tiles + tile + 1)
        if first < end:
            queries = qkv + first.to(tl.int64) * STRIDE + head * D
            keys = qkv + start.to(tl.int64) * STRIDE + (H + head) * D
            values = keys + H * D
            q = _load_rows(queries, end - first, STRIDE, M, 0, MAIN, D)
            if TAIL:
                q_tail = _load_rows(queries, end - first, STRIDE, M, MAIN, TAIL, D)
                acc_tail = tl.zeros([M, TAIL], tl.float32)
            acc = tl.zeros([M, MAIN], tl.float32)
            # The running softmax: its maximum (base 2, scaled) and its sum. The maximum is finite
            # from the start, so that it never makes inf - inf.
            peak = tl.full([M], -1e30, tl.float32)
            total = tl.zeros([M], tl.float32)
            length = end - start
            for at in tl.range(0, length, N, num_stages=STAGES):
                left = length - at
                k = _load_rows(keys, left, STRIDE, N, 0, MAIN, D)
                scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                if TAIL:
                    k_tail = _load_rows(keys, left, STRIDE, N, MAIN, TAIL, D)
                    scores = tl.dot(q_tail, tl.trans(k_tail), scores, input_precision=PRECISION)
                # The last block stays in the loop: with a masked copy of the body after it,
                # Triton 3.6 compiled wrong results on Hopper.
                if left < N:
                    scores = tl.where(tl.arange(0, N)[None, :] < left, scores, float("-inf"))
                new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
                weights = tl.exp2(scores * scale - new_peak[:, None])
                shrink = tl.exp2(peak - new_peak)
                total = total * shrink + tl.sum(weights, 1)
                peak = new_peak
                weights = weights.to(q.dtype)
                v = _load_rows(values, left, STRIDE, N, 0, MAIN, D)
                acc = tl.dot(weights, v, acc * shrink[:, None], input_precision=PRECISION)
                if TAIL:
                    v_tail = _load_rows(values, left, STRIDE, N, MAIN, TAIL, D)
                    acc_tail = tl.dot(
                        weights, v_tail, acc_tail * shrink[:, None], input_precision=PRECISION
                    )
                keys += N * STRIDE
                values += N * STRIDE
            inverse = 1.0 / total[:, None]
            row = tl.arange(0, M)[:, None]
            column = tl.arange(0, MAIN)[None, :]
            target = out + first.to(tl.int64) * (H * D) + head * D
            live = (row < end - first) & (column < D)
            result = (acc * inverse).to(out.dtype.element_ty)
            tl.store(target + row * (H * D) + column, result, mask=live)
            if TAIL:
                column = MAIN + tl.arange(0, TAIL)[None, :]
                live = (row < end - first) & (column < D)
                result = (acc_tail * inverse).to(out.dtype.element_ty)
                tl.store(target + row * (H * D) + column, result, mask=live)


@dataclass(frozen=True, slots=True)
class FlashTiling:
    """How the kernel's work is cut, and how Triton compiles it."""

    block_m: int  # query rows, 64 or 128
    block_n: int  # key rows
    warps: int
    stages: int
    per_processor: int  # programs on a multiprocessor; many: the hardware schedules them
    registers: int | None = None  # at most these for a thread


# For scripts that search; the first is the default: on an H200 it leads at 1296 patches a segment
# and above. Halves of 64 rows fill the processors better where there is one small image.
VARIANTS = (
    FlashTiling(128, 64, 8, 3, 64, 128),
    FlashTiling(128, 64, 8, 4, 64, 128),
    FlashTiling(128, 64, 8, 4, 2, 128),
    FlashTiling(64, 64, 4, 3, 4, 128),
    FlashTiling(64, 64, 4, 2, 3, 168),
)


def split_head(head_dim: int) -> tuple[int, int]:
    """(MAIN, TAIL): powers of two of at least 16 that cover the head; TAIL is 0 where MAIN does."""
    main = max(16, pow2_floor(head_dim))
    return main, max(16, pow2_ceil(head_dim - main)) if head_dim > main else 0


def _tiling(qkv: Tensor) -> FlashTiling:
    if qkv.itemsize == 4:
        # Products run outside the tensor cores, and registers are short.
        return FlashTiling(32, 32, 4, 2, 2)
    if is_hopper(qkv.device) and qkv.shape[-1] <= 96:
        return VARIANTS[0]
    return FlashTiling(128, 64, 8, 2, 1)


def _flash_triton(
    qkv: Tensor, segments: Segments, out: Tensor, tiling: FlashTiling | None = None
) -> Tensor:
    assert qkv.is_contiguous() and out.is_contiguous()
    _, _, heads, head_dim = qkv.shape
    main, tail = split_head(head_dim)
    if tiling is None:
        tiling = _tiling(qkv)
    if segments.tiles is None or segments.tile_count is None:
        assert segments.max_seqlen <= _TILE_ROWS, "only segments of one tile can do without tiles"
        work, count, tile_rows = segments.cu_seqlens, segments.count, 0
        block_m = max(16, pow2_ceil(segments.max_seqlen))
        tiling = replace(tiling, warps=4, registers=None)
        items = (work.numel() - 1) * heads
    else:
        work, count, tile_rows = segments.tiles, segments.tile_count, _TILE_ROWS
        block_m = tiling.block_m
        items = work.shape[0] * (tile_rows // block_m) * heads
    options = {} if tiling.registers is None else {"maxnreg": tiling.registers}
    _flash_kernel[(programs(items, tiling.per_processor, qkv.device),)](
        qkv,
        work,
        count,
        out,
        head_dim**-0.5 * math.log2(math.e),
        heads,
        head_dim,
        main,
        tail,
        tile_rows,
        block_m,
        tiling.block_n,
        tiling.stages,
        "ieee" if qkv.dtype == torch.float32 else "tf32",
        num_warps=tiling.warps,
        **options,
    )
    return out


def flash_attention_ref(qkv: Tensor, segments: Segments, out: Tensor) -> Tensor:
    """Attention within each segment, float32 inside, one rounding; other rows are left alone."""
    start = 0
    for length in segments.lengths:
        q, k, v = qkv[start : start + length].float().permute(1, 2, 0, 3)
        weights = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1)
        out[start : start + length] = (weights @ v).transpose(0, 1).flatten(1).to(out.dtype)
        start += length
    return out


def flash_attention(qkv: Tensor, segments: Segments, out: Tensor) -> Tensor:
    """Attention within each segment, scaled by Dh ** -0.5, q and k already rotated.

    qkv [T, 3, H, Dh] contiguous, Dh a multiple of 8 up to 128; writes the rows of `segments` into
    out [T, H * Dh] and returns it. Segments without tiles must have at most 128 rows.
    """
    if use_triton(qkv):
        return _flash_triton(qkv, segments, out)
    return flash_attention_ref(qkv, segments, out)
