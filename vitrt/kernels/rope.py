"""Rotary position embedding of q and k, one launch, in place on the packed qkv.

Shapes: T patches, H heads, Dh head size, P positions of the table.
NeoX halves: dimension i pairs with i + Dh/2 and turns by frequency i of Dh/2; the first Dh/4 frequencies follow the
patch's row, the rest its column.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from torch import Tensor

from vitrt.kernels.dispatch import ceil_div, jit, pow2_ceil, tl, use_triton

if TYPE_CHECKING:  # attention imports kernels, never the other way round
    from vitrt.attention.base import Rotary


@jit(do_not_specialize=["tokens"])
def _rope_kernel(
    qkv,
    positions,
    cos,
    sin,
    valid,
    tokens,
    H: tl.constexpr,
    HALF: tl.constexpr,
    VEC: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    FLAT: tl.constexpr,
    PADDED: tl.constexpr,
):
    """BLOCK_H heads of q and k (2H in all) of some patches; half a head is CHUNKS vectors of VEC values.

    Dh/2 = 36 is no power of two, so either the vectors of a half are padded to BLOCK_C = 16 for each of BLOCK_T
    patches, or (FLAT) BLOCK_C vectors are taken from the list (patch, vector) and no lane idles. Either way cos and
    sin are fetched once for all heads, and the loads of q and k stand first, so that they overlap the table's.
    Tile axes: FLAT [head, (patch, vector), value], else [patch, head, vector, value].
    """
    value = tl.arange(0, VEC)
    if FLAT:
        head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None, None]
        item = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
        token = (item // CHUNKS)[None, :, None]
        frequency = (item % CHUNKS)[None, :, None] * VEC + value[None, None, :]
        mask = token < tokens
    else:
        head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[None, :, None, None]
        rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
        token = rows[:, None, None, None]
        chunk = tl.arange(0, BLOCK_C)[None, None, :, None]
        frequency = chunk * VEC + value[None, None, None, :]
        mask = (token < tokens) & (chunk < CHUNKS)
    live = mask
    if PADDED:
        count = tl.load(valid)
        live = mask & (token < count)

    patch = token.to(tl.int64) * (6 * H * HALF)
    low_at = qkv + patch + (head * (2 * HALF) + frequency)
    high_at = low_at + HALF
    low = tl.load(low_at, mask=live, other=0.0).to(tl.float32)
    high = tl.load(high_at, mask=live, other=0.0).to(tl.float32)

    quarter: tl.constexpr = HALF // 2
    by_row = frequency < quarter
    position = tl.load(positions + 2 * token + tl.where(by_row, 0, 1), mask=live, other=0)
    entry = position * quarter + tl.where(by_row, frequency, frequency - quarter)
    c = tl.load(cos + entry, mask=live, other=0.0)
    s = tl.load(sin + entry, mask=live, other=0.0)
    tl.store(low_at, (low * c - high * s).to(qkv.dtype.element_ty), mask=mask)
    tl.store(high_at, (high * c + low * s).to(qkv.dtype.element_ty), mask=mask)

    if PADDED:
        # Attention reads the v of padding too, multiplied by zero: NaN there would spread.
        padding = mask & (token >= count)
        zero = tl.zeros_like(low).to(qkv.dtype.element_ty)
        value_at = qkv + patch + ((2 * H + head // 2) * (2 * HALF) + frequency)
        tl.store(value_at, zero, mask=padding)
        tl.store(value_at + HALF, zero, mask=padding)


@dataclass(frozen=True, slots=True)
class RopeTiling:
    """How the kernel is cut. `block` counts patches, or vectors of half a head where `flat`; see `_rope_kernel`."""

    flat: bool
    block: int
    heads: int
    warps: int


@lru_cache(maxsize=256)
def _launch(
    heads: int, half: int, itemsize: int, tiling: RopeTiling
) -> tuple[int, int, int, int, int, int]:
    """(vec, chunks, block_t, block_h, block_c, head groups) of the kernel for this shape."""
    vec = min(half & -half, 16 // itemsize)
    chunks = half // vec
    block_h = min((2 * heads) & -(2 * heads), tiling.heads)
    block_t, block_c = (1, tiling.block) if tiling.flat else (tiling.block, pow2_ceil(chunks))
    return vec, chunks, block_t, block_h, block_c, 2 * heads // block_h


_SMALL = RopeTiling(flat=True, block=32, heads=8, warps=4)
_LARGE = RopeTiling(flat=True, block=64, heads=16, warps=4)


def _rope_triton(qkv: Tensor, rotary: Rotary, tiling: RopeTiling | None = None) -> None:
    assert qkv.is_contiguous()
    tokens, _, heads, head_dim = qkv.shape
    if tokens == 0:
        return
    if tiling is None:
        tiling = _SMALL if tokens < 4096 else _LARGE
    half = head_dim // 2
    vec, chunks, block_t, block_h, block_c, groups = _launch(heads, half, qkv.itemsize, tiling)
    programs = ceil_div(tokens * chunks, block_c) if tiling.flat else ceil_div(tokens, block_t)
    valid = rotary.valid
    _rope_kernel[(programs, groups)](
        qkv,
        rotary.positions,
        rotary.cos,
        rotary.sin,
        valid,
        tokens,
        heads,
        half,
        vec,
        chunks,
        block_t,
        block_h,
        block_c,
        tiling.flat,
        valid is not None,
        num_warps=tiling.warps,
    )


# Rows that are turned at once on the CPU: the q and k of 128 patches (1.2 MB at 16 heads of 72) and their
# temporaries stay in a core's second-level cache between the passes.
_CPU_ROWS = 128


def rope_ref(qkv: Tensor, rotary: Rotary) -> None:
    """RoPE as the kernel does it: float32 inside, one rounding, in place."""
    half = qkv.shape[-1] // 2
    for start in range(0, qkv.shape[0], _CPU_ROWS):
        rows = slice(start, start + _CPU_ROWS)
        position = rotary.positions[rows]
        cos = rotary.cos[position].view(-1, 1, 1, half)
        sin = rotary.sin[position].view(-1, 1, 1, half)
        block = qkv[rows, :2]
        turned = block.float()  # the same memory where qkv is float32
        low, high = turned[..., :half], turned[..., half:]
        low_sin = low * sin
        low.mul_(cos).addcmul_(high, sin, value=-1.0)
        high.mul_(cos).add_(low_sin)
        if turned.dtype != qkv.dtype:
            block.copy_(turned)
    if rotary.valid is not None:
        qkv[int(rotary.valid) :] = 0


def rope_(qkv: Tensor, rotary: Rotary) -> None:
    """Rotate q and k of qkv [T, 3, H, Dh] (contiguous, Dh a multiple of 8) in place.

    Where `rotary.valid` is given, the rows past it are set to zero in q, k and v.
    """
    if qkv.shape[-1] % 8:
        raise ValueError(f"head size {qkv.shape[-1]} cannot be rotated: it must be a multiple of 8")
    if use_triton(qkv):
        _rope_triton(qkv, rotary)
    else:
        rope_ref(qkv, rotary)
