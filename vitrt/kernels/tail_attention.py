"""Attention of a few query rows over long segments: the keys are split over all processors.

A kernel that works in tiles of many query rows takes a whole wave of blocks for the last few rows
of an image. These rows alone are decoding's problem: little to compute, all keys to read.

Shapes: T patches, H heads, Dh head size, R entries of the work list, of at most 64 query rows each,
M query rows and N key rows of a block. Heads are split in MAIN + TAIL, see attention_block.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vitrt.kernels.attention_block import attend, softmax_scale, split_head, store_rows
from vitrt.kernels.dispatch import dot_precision, jit, pow2_floor, tl, use_triton
from vitrt.kernels.persistent import processors, programs

TAIL_ROWS = 64  # query rows of one entry of a work list


@dataclass(frozen=True, slots=True)
class TailRows:
    """Query rows that another kernel left out; there may be room for more than are in use."""

    entries: Tensor  # int32 [R, 3]: first row, segment start and end; all up to TAIL_ROWS rows
    count: Tensor  # int32 [1], entries in use


@jit()
def _keys_a_split(length, SPLITS: tl.constexpr, N: tl.constexpr):
    """Keys of each split but the last: whole blocks, so a short segment leaves splits empty."""
    return tl.cdiv(tl.cdiv(length, SPLITS), N) * N


# The work list lies anywhere in a packed plan: its alignment must not cost another compilation.
@jit(do_not_specialize=["scale"], do_not_specialize_on_alignment=["entries", "count"])
def _partial_kernel(
    qkv, entries, count, partial, level, scale, H: tl.constexpr, D: tl.constexpr,
    MAIN: tl.constexpr, TAIL: tl.constexpr, ENTRY: tl.constexpr, SPLITS: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Programs stride over (M rows of an entry, split of its keys, head): `partial`
    [items, M, D] is the attention over those keys alone, `level` [items, M] the logarithm (base 2)
    of the sum of their weights.

    The heads of a split are neighbours in the order of work: their keys and values are neighbours
    in memory. Offsets into the scratch fit 32 bits by far: a list is short.
    """
    STRIDE: tl.constexpr = 3 * H * D
    PARTS: tl.constexpr = ENTRY // M
    work = tl.load(count) * (PARTS * SPLITS * H)
    for item in tl.range(tl.program_id(0), work, tl.num_programs(0)):
        head = item % H
        split = item // H % SPLITS
        part = item // (H * SPLITS) % PARTS
        entry = item // (H * SPLITS * PARTS)
        first = tl.load(entries + 3 * entry) + part * M
        start = tl.load(entries + 3 * entry + 1)
        end = tl.load(entries + 3 * entry + 2)
        span = _keys_a_split(end - start, SPLITS, N)
        start += split * span
        if (first < end) & (start < end):
            queries = qkv + first.to(tl.int64) * STRIDE + head * D
            keys = qkv + start.to(tl.int64) * STRIDE + (H + head) * D
            values = keys + H * D
            result, result_tail, levels = attend(
                queries, end - first, keys, values, tl.minimum(end - start, span), scale, STRIDE, D,
                MAIN, TAIL, M, N, STAGES, PRECISION,
            )  # fmt: skip
            target = partial + item * (M * D)
            store_rows(target, result, end - first, D, M, 0, MAIN, D)
            if TAIL:
                store_rows(target, result_tail, end - first, D, M, MAIN, TAIL, D)
            row = tl.arange(0, M)
            tl.store(level + item * M + row, levels, mask=row < end - first)


@jit(do_not_specialize_on_alignment=["entries", "count"])
def _combine_kernel(
    partial, level, entries, count, out, H: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr,
    TAIL: tl.constexpr, ENTRY: tl.constexpr, SPLITS: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """Programs stride over (query row, head): the partial results of all splits, each by its share
    of the weights.
    """
    PARTS: tl.constexpr = ENTRY // M
    work = tl.load(count) * (ENTRY * H)
    for item in tl.range(tl.program_id(0), work, tl.num_programs(0)):
        head = item % H
        row = item // H % ENTRY
        entry = item // (H * ENTRY)
        first = tl.load(entries + 3 * entry) + row
        start = tl.load(entries + 3 * entry + 1)
        end = tl.load(entries + 3 * entry + 2)
        if first < end:
            split = tl.arange(0, SPLITS)
            live = split * _keys_a_split(end - start, SPLITS, N) < end - start
            places = ((entry * PARTS + row // M) * SPLITS + split) * H + head
            places = places * M + row % M
            levels = tl.load(level + places, mask=live, other=float("-inf"))
            shares = tl.exp2(levels - tl.max(levels, 0))
            shares = shares / tl.sum(shares, 0)
            target = out + first.to(tl.int64) * (H * D) + head * D
            column = tl.arange(0, MAIN)
            pointers = partial + places[:, None] * D + column[None, :]
            mask = live[:, None] & (column < D)[None, :]
            result = tl.sum(tl.load(pointers, mask=mask, other=0.0) * shares[:, None], 0)
            tl.store(target + column, result.to(out.dtype.element_ty), mask=column < D)
            if TAIL:
                column = MAIN + tl.arange(0, TAIL)
                pointers = partial + places[:, None] * D + column[None, :]
                mask = live[:, None] & (column < D)[None, :]
                result = tl.sum(tl.load(pointers, mask=mask, other=0.0) * shares[:, None], 0)
                tl.store(target + column, result.to(out.dtype.element_ty), mask=column < D)


@dataclass(frozen=True, slots=True)
class TailTiling:
    """The sizes of the blocks: block_m 16, 32 or 64 query rows, block_n key rows, and how Triton
    compiles the first of the two.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    per_processor: int  # items of one entry that each multiprocessor gets
    combine_warps: int = 1


# For scripts that search; the first is the default.
VARIANTS = (
    TailTiling(64, 64, 4, 2, 2),
    TailTiling(64, 64, 4, 3, 2),
    TailTiling(64, 64, 4, 2, 4),
    TailTiling(64, 32, 4, 3, 4),
    TailTiling(64, 128, 4, 2, 2),
    TailTiling(32, 64, 4, 2, 2),
    TailTiling(32, 64, 4, 3, 4),
    TailTiling(32, 64, 2, 3, 4),
    TailTiling(16, 64, 4, 3, 4),
    TailTiling(16, 128, 4, 2, 2),
)
_MOST_SPLITS = 32  # the second kernel holds a row of all of them at once


def _splits(heads: int, tiling: TailTiling, device: torch.device) -> int:
    """Splits of the keys that give each processor its items where one entry is all there is."""
    wanted = processors(device) * tiling.per_processor // heads
    return min(pow2_floor(max(wanted, 2)), _MOST_SPLITS)


def _tail_triton(
    qkv: Tensor, rows: TailRows, out: Tensor, tiling: TailTiling = VARIANTS[0]
) -> Tensor:
    assert qkv.is_contiguous() and out.is_contiguous()
    assert TAIL_ROWS % tiling.block_m == 0
    _, _, heads, head_dim = qkv.shape
    main, tail = split_head(head_dim)
    splits = _splits(heads, tiling, qkv.device)
    most_rows = rows.entries.shape[0] * TAIL_ROWS  # room for so many
    items = most_rows // tiling.block_m * splits * heads
    partial = qkv.new_empty(items, tiling.block_m, head_dim, dtype=torch.float32)
    level = qkv.new_empty(items, tiling.block_m, dtype=torch.float32)
    _partial_kernel[(programs(items, 2 * tiling.per_processor, qkv.device),)](
        qkv, rows.entries, rows.count, partial, level, softmax_scale(head_dim), heads,
        head_dim, main, tail, TAIL_ROWS, splits, tiling.block_m, tiling.block_n, tiling.stages,
        dot_precision(qkv), num_warps=tiling.warps,
    )  # fmt: skip
    _combine_kernel[(programs(most_rows * heads, 16, qkv.device),)](
        partial, level, rows.entries, rows.count, out, heads, head_dim, main, tail, TAIL_ROWS,
        splits, tiling.block_m, tiling.block_n, num_warps=tiling.combine_warps,
    )  # fmt: skip
    return out


def tail_attention_ref(qkv: Tensor, rows: TailRows, out: Tensor) -> Tensor:
    """The tail rows of attention, float32 inside, one rounding; reads the work list here."""
    for first, start, end in rows.entries[: int(rows.count)].tolist():
        last = min(first + TAIL_ROWS, end)
        q = qkv[first:last, 0].float().transpose(0, 1)
        k, v = qkv[start:end, 1:].float().permute(1, 2, 0, 3)
        weights = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1)
        out[first:last] = (weights @ v).transpose(0, 1).flatten(1).to(out.dtype)
    return out


def tail_attention(qkv: Tensor, rows: TailRows, out: Tensor) -> Tensor:
    """Attention of the query rows in `rows.entries` over all keys of their segments, scaled by
    Dh ** -0.5, q and k already rotated.

    qkv [T, 3, H, Dh] contiguous, Dh a multiple of 8 up to 128; writes those rows of out
    [T, H * Dh], no others, and returns it.
    """
    if use_triton(qkv):
        return _tail_triton(qkv, rows, out)
    return tail_attention_ref(qkv, rows, out)
