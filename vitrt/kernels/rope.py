"""Rotary position embedding of q and k, one launch, in place on the packed qkv.

Shapes: T patches, H heads, Dh head size.

Halves are paired as in NeoX: dimension i with i + Dh/2, rotated by frequency i of Dh/2. The first
Dh/4 frequencies follow the patch's row, the rest its column.
"""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor

from vitrt.kernels.dispatch import jit, pow2_ceil, tl, use_triton
from vitrt.kernels.segments import Rotary


# What a plan packs may lie anywhere: its alignment must not cost another compilation.
@jit(do_not_specialize_on_alignment=["positions", "valid"])
def _rope_kernel(
    qkv, positions, cos, sin, valid, H: tl.constexpr, HALF: tl.constexpr, VEC: tl.constexpr,
    CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """BLOCK_H of the 2H heads of q and k of one patch: tiles [vector, head, value] of half heads.

    Dh/2 = 36 is no power of two: a half is CHUNKS = 9 vectors of VEC = 4, padded to BLOCK_C = 16.
    Triton gives the lanes of a warp to the first axis, then the second, so a warp touches whole
    halves of neighbouring heads and each lane reuses its cosines for all its heads. With one patch
    a program the tables take fewer values than there are lanes; with more, Triton would give them a
    layout of their own and shuffle q and k through shared memory.
    """
    token = tl.program_id(0)
    chunk = tl.arange(0, BLOCK_C)[:, None, None]
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[None, :, None]
    frequency = chunk * VEC + tl.arange(0, VEC)[None, None, :]
    mask = chunk < CHUNKS
    patch = qkv + token.to(tl.int64) * (6 * H * HALF)
    low_at = patch + (head * (2 * HALF) + frequency)
    high_at = low_at + HALF
    low = tl.load(low_at, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(high_at, mask=mask, other=0.0).to(tl.float32)
    live = mask
    if PADDED:
        # After the loads, which need not wait for the count; selecting drops NaN.
        count = tl.load(valid)
        live = mask & (token < count)
        low = tl.where(live, low, 0.0)
        high = tl.where(live, high, 0.0)
        if token >= count:
            # Attention multiplies the v of padding by zero, which NaN would survive.
            zero = tl.zeros((BLOCK_C, BLOCK_H, VEC), qkv.dtype.element_ty)
            value_at = patch + ((2 * H + head // 2) * (2 * HALF) + frequency)
            tl.store(value_at, zero, mask=mask)
            tl.store(value_at + HALF, zero, mask=mask)

    row = tl.load(positions + 2 * token)
    column = tl.load(positions + 2 * token + 1)
    quarter: tl.constexpr = HALF // 2
    entry = tl.where(frequency < quarter, row * quarter, (column - 1) * quarter) + frequency
    c = tl.load(cos + entry, mask=live, other=0.0)
    s = tl.load(sin + entry, mask=live, other=0.0)
    tl.store(low_at, (low * c - high * s).to(qkv.dtype.element_ty), mask=mask)
    tl.store(high_at, (high * c + low * s).to(qkv.dtype.element_ty), mask=mask)


@lru_cache(maxsize=256)
def _tiling(
    heads: int, half: int, itemsize: int, block_h: int, spread: int
) -> tuple[int, int, int, int, int, int]:
    """(vec, chunks, block_c, block_h, head groups, warps) for at most `block_h` heads a program.

    There are `spread` lanes for every value of a padded half, two at least: from there on Triton
    lets cos and sin share the layout of q and k.
    """
    vec = min(half & -half, 16 // itemsize)
    chunks = half // vec
    block_c = pow2_ceil(chunks)
    block_h = min((2 * heads) & -(2 * heads), block_h)
    warps = min(max(block_c * vec * spread // 32, 1), 8)
    return vec, chunks, block_c, block_h, 2 * heads // block_h, warps


def _rope_triton(qkv: Tensor, rotary: Rotary, block_h: int = 16, spread: int = 2) -> None:
    assert qkv.is_contiguous()
    tokens, _, heads, head_dim = qkv.shape
    if tokens == 0:
        return
    half = head_dim // 2
    vec, chunks, block_c, block_h, groups, warps = _tiling(
        heads, half, qkv.itemsize, block_h, spread
    )
    valid = rotary.valid
    _rope_kernel[(tokens, groups)](
        qkv, rotary.positions, rotary.cos, rotary.sin, valid, heads, half, vec, chunks, block_c,
        block_h, valid is not None, num_warps=warps,
    )  # fmt: skip


# Rows rotated at once on the CPU: the q and k of 128 patches (1.2 MB at 16 heads of 72) and their
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
        rotated = block.float()  # the same memory where qkv is float32
        low, high = rotated[..., :half], rotated[..., half:]
        low_sin = low * sin
        low.mul_(cos).addcmul_(high, sin, value=-1.0)
        high.mul_(cos).add_(low_sin)
        if rotated.dtype != qkv.dtype:
            block.copy_(rotated)
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
