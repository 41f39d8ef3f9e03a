"""Segments, poisoned buffers and the reference that tests of attention share."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from vitrt.kernels.segments import Rotary, Segments, tile_list


def make_segments(
    lengths: list[int], *, room: int = 0, tiles: bool = True, device: str = "cpu"
) -> Segments:
    """Segments as a plan makes them, with `room` unused entries as a graph's buffers have."""
    cu = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    work = tile_list(cu)
    room_in_tiles = np.full((room, 3), 2**30, dtype=np.int32)  # read, these would fault
    padded = np.concatenate([cu, np.full(room, cu[-1], dtype=np.int32)])

    def tensor(array: object) -> Tensor:
        return torch.as_tensor(array, dtype=torch.int32, device=device)

    return Segments(
        cu_seqlens=tensor(padded),
        count=tensor([len(lengths)]),
        tiles=tensor(np.concatenate([work, room_in_tiles])) if tiles else None,
        tile_count=tensor([len(work)]) if tiles else None,
        lengths=tuple(lengths),
        max_seqlen=max(lengths),
    )


def no_rotary(tokens: int, head_dim: int, device: str = "cpu") -> Rotary:
    table = torch.zeros(1, head_dim // 4, device=device)
    positions = torch.zeros(tokens, 2, dtype=torch.int32, device=device)
    return Rotary(positions, table + 1, table)


def dense_reference(qkv: Tensor, lengths: list[int]) -> Tensor:
    """Attention in float64 under an explicit [T, T] mask: as unlike the backends as can be."""
    _, _, heads, head_dim = qkv.shape
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    used = len(segment)
    q, k, v = qkv[:used].double().cpu().permute(1, 2, 0, 3)
    scores = q @ k.transpose(1, 2) / math.sqrt(head_dim)
    scores = scores.masked_fill(segment[:, None] != segment[None, :], -math.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1).reshape(used, heads * head_dim)


def poisoned(
    lengths: list[int], padding: int, heads: int, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """qkv with NaN in its padding rows, and an output full of NaN."""
    torch.manual_seed(head_dim + sum(lengths))
    tokens = sum(lengths)
    qkv = torch.randn(tokens + padding, 3, heads, head_dim)
    qkv[tokens:] = math.nan
    return qkv, torch.full((tokens + padding, heads * head_dim), math.nan)


def make_rotary(tokens: int, head_dim: int, device: str = "cpu") -> Rotary:
    """Random positions in a table of 40, with the towers' frequencies."""
    quarter = head_dim // 4
    inverse = 10000 ** -(torch.arange(quarter) / quarter)
    angles = torch.arange(40)[:, None] * inverse
    positions = torch.randint(0, 40, (tokens, 2), dtype=torch.int32)
    return Rotary(positions.to(device), angles.cos().to(device), angles.sin().to(device))


def rotated(qkv: Tensor, rotary: Rotary) -> Tensor:
    """RoPE of q and k as transformers writes it, in float64: x * cos + rotate_half(x) * sin."""
    positions = rotary.positions.long().cpu()
    cos, sin = rotary.cos.double().cpu(), rotary.sin.double().cpu()
    cos = torch.cat([cos[positions[:, 0]], cos[positions[:, 1]]], -1).repeat(1, 2)[:, None, None]
    sin = torch.cat([sin[positions[:, 0]], sin[positions[:, 1]]], -1).repeat(1, 2)[:, None, None]
    result = qkv.double().cpu().clone()
    x = result[:, :2]
    low, high = x.chunk(2, -1)
    result[:, :2] = x * cos + torch.cat([-high, low], -1) * sin
    return result


def rotary_case(
    lengths: list[int], padding: int, heads: int, head_dim: int
) -> tuple[Tensor, Rotary, Tensor]:
    """(qkv with NaN in its padding rows, rotary, an output full of NaN)."""
    torch.manual_seed(head_dim + sum(lengths))
    tokens = sum(lengths) + padding
    qkv = torch.randn(tokens, 3, heads, head_dim)
    qkv[sum(lengths) :] = math.nan
    return qkv, make_rotary(tokens, head_dim), torch.full((tokens, heads * head_dim), math.nan)
