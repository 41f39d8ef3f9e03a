"""Variable-length attention for full layers, over the packed qkv without copying it.

Shapes: T patches, H heads, Dh head size, C entries of the work list, M query rows and N key rows of
a block. Heads are split in MAIN + TAIL, see attention_block.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from vitrt.kernels.attention_block import attend, softmax_scale, split_head, store_rows, work_list
from vitrt.kernels.dispatch import ceil_div, dot_precision, jit, tl, use_triton
from vitrt.kernels.persistent import is_hopper, processors, programs
from vitrt.kernels.segments import TILE_ROWS, Segments


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
            result, result_tail, _ = attend(
                queries, end - first, keys, values, end - start, scale, STRIDE, D, MAIN, TAIL, M, N,
                STAGES, PRECISION,
            )  # fmt: skip
            target = out + first.to(tl.int64) * (H * D) + head * D
            store_rows(target, result, end - first, H * D, M, 0, MAIN, D)
            if TAIL:
                store_rows(target, result_tail, end - first, H * D, M, MAIN, TAIL, D)


@dataclass(frozen=True, slots=True)
class FlashTiling:
    """The kernel's block sizes, and how Triton compiles it."""

    block_m: int  # query rows, 64 or 128
    block_n: int  # key rows
    warps: int
    stages: int
    per_processor: int  # programs on a multiprocessor; many: the hardware schedules them
    registers: int | None = None  # at most these for a thread


# For scripts that search. On an H200 the first leads from 576 patches on. The second has blocks of
# half as many rows, which fill more processors, and leads up to 512: with RoPE 1 x 196 takes 8.1 us
# instead of 10.0, 1 x 400 11.1 instead of 13.8. Both take 64 keys at a time, so that a segment's
# bits are the same.
VARIANTS = (
    FlashTiling(128, 64, 8, 3, 64, 128),
    FlashTiling(64, 64, 4, 3, 64),
    FlashTiling(128, 64, 8, 4, 64, 128),
    FlashTiling(128, 64, 8, 4, 2, 128),
    FlashTiling(64, 64, 4, 2, 3, 168),
)
_MANY_ROWS, _FEW_ROWS = VARIANTS[:2]


def _tiling(qkv: Tensor) -> FlashTiling:
    if qkv.itemsize == 4:
        # Products run outside the tensor cores, and registers are short.
        return FlashTiling(32, 32, 4, 2, 2)
    tokens, _, heads, head_dim = qkv.shape
    if is_hopper(qkv.device) and head_dim <= 96:
        blocks = ceil_div(tokens, _FEW_ROWS.block_m) * heads
        return _FEW_ROWS if blocks <= processors(qkv.device) else _MANY_ROWS
    return FlashTiling(128, 64, 8, 2, 1)


def _flash_triton(
    qkv: Tensor, segments: Segments, out: Tensor, tiling: FlashTiling | None = None
) -> Tensor:
    assert qkv.is_contiguous() and out.is_contiguous()
    _, _, heads, head_dim = qkv.shape
    main, tail = split_head(head_dim)
    if tiling is None:
        tiling = _tiling(qkv)
    work = work_list(segments, tiling.block_m)
    if not work.tile_rows:
        # Four warps would spill where they hold 128 rows.
        tiling = replace(tiling, warps=8 if work.block_m == TILE_ROWS else 4, registers=None)
    options = {} if tiling.registers is None else {"maxnreg": tiling.registers}
    _flash_kernel[(programs(work.blocks * heads, tiling.per_processor, qkv.device),)](
        qkv, work.entries, work.count, out, softmax_scale(head_dim), heads, head_dim, main, tail,
        work.tile_rows, work.block_m, tiling.block_n, tiling.stages, dot_precision(qkv),
        num_warps=tiling.warps, **options,
    )  # fmt: skip
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
