"""Uint8 images to normalised patches, in any order, in one pass.

Shapes: T patches, p patch size, t temporal patch size, B bytes of all images; a patch is
[channel 3, frame t, row p, column p].
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitrt.kernels.dispatch import ceil_div, jit, pow2_ceil, tl, use_triton


# Pixels and sources may lie anywhere: their alignment must not cost another compilation.
@jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["pixels", "sources"])
def _patchify_kernel(
    pixels, sources, table, out, tokens, P: tl.constexpr, FRAMES: tl.constexpr, CLIPS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK_T patches, a frame at a time, as tiles [patch, (channel, row, column)].

    Lanes follow the output, four times the input in bytes: its stores are wide, and the byte loads,
    three apart, find their lines in the first-level cache. The table (3 KiB) lives there too. That
    of clips, whose frames differ, begins CLIPS values further on.
    """
    patch = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    item = tl.arange(0, BLOCK)[None, :]
    channel = item // (P * P)
    pixel = item % (P * P)
    offset = tl.load(sources + 3 * patch, mask=patch < tokens, other=-1)
    row_bytes = tl.load(sources + 3 * patch + 1, mask=patch < tokens, other=0)
    frame_bytes = tl.load(sources + 3 * patch + 2, mask=patch < tokens, other=0)
    source = pixels + (offset + (pixel // P) * row_bytes + (pixel % P) * 3 + channel)
    target = out + patch.to(tl.int64) * (3 * FRAMES * P * P) + (channel * (FRAMES * P * P) + pixel)

    inside = (patch < tokens) & (item < 3 * P * P)
    live = inside & (offset >= 0)  # a negative offset marks padding
    level = tl.load(source, mask=live, other=0).to(tl.int32)
    levels = table + channel * 256 + tl.where(frame_bytes != 0, CLIPS, 0)
    values = tl.load(levels + level, mask=live, other=0.0)
    tl.store(target, values.to(out.dtype.element_ty), mask=inside)
    # The frames of an image are one and the same: read once, written FRAMES times.
    moves = live & (frame_bytes != 0)
    for frame in tl.static_range(1, FRAMES):
        level = tl.load(source + frame * frame_bytes, mask=moves, other=0).to(tl.int32)
        other = tl.load(levels + level, mask=moves, other=0.0)
        other = tl.where(moves, other, values)
        tl.store(target + frame * P * P, other.to(out.dtype.element_ty), mask=inside)


def _patchify_triton(
    pixels: Tensor,
    sources: Tensor,
    table: Tensor,
    patch_size: int,
    temporal_patch_size: int,
    out: Tensor,
    rows: int = 1,
    warps: int = 4,
) -> Tensor:
    tokens = sources.shape[0]
    if tokens:
        _patchify_kernel[(ceil_div(tokens, rows),)](
            pixels, sources, table, out, tokens, patch_size, temporal_patch_size,
            table.numel() // 2 if table.dim() == 3 else 0, rows,
            pow2_ceil(3 * patch_size * patch_size), num_warps=warps,
        )  # fmt: skip
    return out


# Patches that the CPU path takes at once: what it keeps beside the output stays in cache.
_CPU_PATCHES = 256


def patchify_ref(
    pixels: Tensor,
    sources: Tensor,
    table: Tensor,
    patch_size: int,
    temporal_patch_size: int,
    out: Tensor,
) -> Tensor:
    """Patchify in PyTorch: gather the patches' pixel rows, 3 p bytes each; look the levels up."""
    p, row_length = patch_size, 3 * patch_size
    # [3, 512]: a channel's levels in stills, then in clips.
    levels = table.to(out.dtype).expand(2, 3, 256).transpose(0, 1).reshape(3, -1)
    # Row i of this view is the pixel row that starts at byte i.
    runs = pixels.as_strided((max(pixels.numel() - row_length + 1, 0), row_length), (1, 1))
    for start in range(0, sources.shape[0], _CPU_PATCHES):
        chunk = sources[start : start + _CPU_PATCHES].long()
        patches = out[start : start + _CPU_PATCHES].view(-1, 3, temporal_patch_size, p, p)
        real = chunk[:, 0] >= 0
        padded = not bool(real.all())
        if padded:
            patches[~real] = 0
            chunk = chunk[real]
        rows = chunk[:, :1] + torch.arange(p, device=chunk.device) * chunk[:, 1:2]
        shifts = (chunk[:, 2:] != 0).int() * 256
        moves = bool(shifts.any())
        frames = []
        for frame in range(temporal_patch_size if moves else 1):
            starts = (rows + frame * chunk[:, 2:]).flatten()
            bytes_ = runs[starts].view(-1, p * p, 3).int()
            if moves:
                bytes_ += shifts[:, None]
            channels = [levels[c][bytes_[..., c]] for c in range(3)]
            frames.append(torch.stack(channels, 1).view(-1, 3, 1, p, p))
        values = (
            torch.cat(frames, 2) if moves else frames[0].expand(-1, -1, temporal_patch_size, p, p)
        )
        if padded:
            patches[real] = values
        else:
            patches.copy_(values)
    return out


def patchify(
    pixels: Tensor,
    sources: Tensor,
    table: Tensor,
    patch_size: int,
    temporal_patch_size: int,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """Gather patches from raw images and normalise them; returns [T, 3 * t * p * p] in `dtype`.

    Args:
        pixels: uint8 [B], images [frame, height, width, 3] one after the other.
        sources: int32 [T, 3], for each patch the byte of its first pixel, the bytes of a pixel row
            of its image, and the bytes from a frame to the next (0: the frame is repeated). A
            negative first byte marks a row of padding, which is set to zero.
        table: float32 [3, 256], every channel's levels normalised, which the result rounds once; or
            [2, 3, 256], of stills and of what has frames that differ.
    """
    width = 3 * temporal_patch_size * patch_size * patch_size
    if out is None:
        out = torch.empty(sources.shape[0], width, dtype=dtype, device=pixels.device)
    assert out.shape == (sources.shape[0], width) and out.dtype == dtype and out.is_contiguous()
    assert pixels.dim() == 1 and pixels.is_contiguous() and sources.is_contiguous()
    if use_triton(pixels):
        return _patchify_triton(pixels, sources, table, patch_size, temporal_patch_size, out)
    return patchify_ref(pixels, sources, table, patch_size, temporal_patch_size, out)
