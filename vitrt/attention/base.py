"""What an attention backend is given and what it must say about itself.

Shapes: T patches, S segments, H heads, Dh head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class QueryCut:
    """Query rows in whole tiles, for a backend that works in large ones, and the rests beside them,
    for kernels/rest_attention.py (see attention/rests.py).

    Like all of `Segments` it may have room for more than is used.
    """

    whole: Tensor  # int32 [S], query rows of each segment in whole tiles; its keys stay whole
    rests: Tensor  # int32 [R, 3]: query row, segment start and end; all up to REST_ROWS rows
    rest_count: Tensor  # int32 [1], rests in use


@dataclass(frozen=True, slots=True)
class Segments:
    """Boundaries of the segments that attend only to themselves.

    The device tensors may have room for more than is used (CUDA graphs): `cu_seqlens` then repeats
    its last value, and the counts say how many entries are real. `lengths` and `max_seqlen` live on
    the host.
    """

    cu_seqlens: Tensor  # int32 [S + 1], first 0
    count: Tensor  # int32 [1], segments in use
    tiles: Tensor | None  # int32 [C, 3]: query row, segment start and end; None for windows
    tile_count: Tensor | None  # int32 [1], tiles in use
    lengths: tuple[int, ...]  # S lengths in use, in order
    max_seqlen: int  # an upper bound of `lengths`; a graph's own bound while one is recorded
    cut: QueryCut | None = None  # only for a backend that asked for it


TILE_ROWS = 128  # query rows of one entry of `Segments.tiles`
REST_ROWS = 64  # query rows of one entry of `QueryCut.rests`


@dataclass(frozen=True, slots=True)
class Rotary:
    """Rotary positions of every patch and the float32 table they index, which is never rounded."""

    positions: Tensor  # int32 [T, 2]: row, column
    cos: Tensor  # float32 [positions, Dh / 4]
    sin: Tensor  # float32 [positions, Dh / 4]
    valid: Tensor | None = None  # int32 [1]: rows past it are padding; None where there is none


class AttentionBackend(Protocol):
    """Non-causal variable-length self-attention over packed segments."""

    name: str
    capturable: bool  # may be recorded into a CUDA graph
    applies_rotary: bool  # rotates q and k itself; otherwise they arrive rotated

    def __call__(
        self, qkv: Tensor, segments: Segments, rotary: Rotary, out: Tensor | None = None
    ) -> Tensor:
        """Attend within each segment, scaled by Dh ** -0.5.

        qkv [T, 3, H, Dh], contiguous. Returns [T, H * Dh] in `out` where it is given. Rows outside
        every segment are left unwritten.
        """
        ...


@dataclass(frozen=True, slots=True)
class BackendSpec:
    """A registry entry: what it takes to know whether a backend can run, without importing it.

    Both callables are asked with (device, dtype, head size).
    """

    name: str
    load: Callable[[torch.device, torch.dtype, int], AttentionBackend]
    # None, or why it cannot run
    unavailable: Callable[[torch.device, torch.dtype, int], str | None]
    windows_only: bool = False  # made for short segments: never used for full-attention layers
    most_window: int | None = None  # patches of the largest window it takes; None: of any size

    def takes_windows(self, patches: int) -> bool:
        """Whether windows of at most so many patches go through it; 0: there are none."""
        return self.most_window is None or patches <= self.most_window


def attention_shape(qkv: Tensor) -> torch.Size:
    """[T, H * Dh], the shape of what attention over `qkv` returns."""
    return torch.Size((qkv.shape[0], qkv.shape[2] * qkv.shape[3]))


def tile_list(cu_seqlens: np.ndarray) -> np.ndarray:
    """The work list of `Segments.tiles`: int32 [n, 3], (query row, segment start, segment end).

    `cu_seqlens` [S + 1] on the host. Segments that are longest come first: their tiles take the
    most time, and a list that ends with short ones keeps all processors busy to the end.
    """
    cu_seqlens = np.asarray(cu_seqlens, dtype=np.int64)
    starts, ends = cu_seqlens[:-1], cu_seqlens[1:]
    order = np.argsort(starts - ends, kind="stable")
    starts, ends = starts[order], ends[order]
    counts = -(-(ends - starts) // TILE_ROWS)
    first = np.cumsum(counts) - counts  # of each segment's tiles in the list
    within = np.arange(counts.sum()) - np.repeat(first, counts)
    tiles = np.empty((len(within), 3), dtype=np.int32)
    tiles[:, 0] = np.repeat(starts, counts) + within * TILE_ROWS
    tiles[:, 1] = np.repeat(starts, counts)
    tiles[:, 2] = np.repeat(ends, counts)
    return tiles
