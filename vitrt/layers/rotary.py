"""Two-dimensional rotary embedding: positions cached by grid, and the float32 table they index.

Shapes: n = h * w patches of one frame, Dh head size.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitrt.config import ROPE_THETA
from vitrt.kernels.segments import Rotary
from vitrt.layers.cache import ByteCache

TABLE_POSITIONS = 8192  # rows or columns of patches: 131072 pixels a side at patch size 16
_CACHE_BYTES = 64 << 20


def rotary_tables(head_dim: int, positions: int) -> tuple[Tensor, Tensor]:
    """cos and sin of position * inv_freq, float32 [positions, Dh / 4], on the CPU.

    Half of the head turns with the row, half with the column, so inv_freq is
    10000 ** -(arange(0, d, 2) / d) with d = Dh / 2. Computed in float32 as transformers does, and
    never stored in a module's state: a buffer would be rounded by `.to(bfloat16)`.
    """
    width = head_dim // 2
    steps = torch.arange(0, width, 2, dtype=torch.float32, device="cpu")
    inv_freq = 1.0 / (ROPE_THETA ** (steps / width))
    angles = torch.outer(torch.arange(positions, dtype=torch.float32, device="cpu"), inv_freq)
    return angles.cos(), angles.sin()


class RotaryPosMixin:
    """Rotary position ids of a tower, computed with numpy and cached by plain (h, w, merge)."""

    rotary_head_dim: int
    _tables: tuple[Tensor, Tensor] | None = None

    def init_rotary(self, head_dim: int) -> None:
        self.rotary_head_dim = head_dim
        self.position_ids_cache: ByteCache[tuple[int, int, int], NDArray[np.int32]] = ByteCache(
            _CACHE_BYTES
        )

    def rotary_position_ids(self, h: int, w: int, merge: int) -> NDArray[np.int32]:
        """(row, column) of every patch of a frame, int32 [h * w, 2], merge x merge blocks first."""
        return self.position_ids_cache.get((h, w, merge), lambda: _position_ids(h, w, merge))

    def rotary(self, positions: Tensor, valid: Tensor | None, largest: int) -> Rotary:
        """The rotation by `positions` int32 [T, 2], none of them above `largest`."""
        tables = self._tables
        if tables is None or tables[0].device != positions.device or largest >= len(tables[0]):
            size = max(TABLE_POSITIONS, 1 << largest.bit_length())
            cos, sin = rotary_tables(self.rotary_head_dim, size)
            tables = (cos.to(positions.device), sin.to(positions.device))
            # A larger one is rare, and keeping this one keeps recorded graphs valid.
            if size == TABLE_POSITIONS:
                self._tables = tables
        return Rotary(positions, *tables, valid)


def _position_ids(h: int, w: int, merge: int) -> NDArray[np.int32]:
    raster = np.stack(np.meshgrid(np.arange(h), np.arange(w), indexing="ij"), axis=-1)
    blocks = raster.reshape(h // merge, merge, w // merge, merge, 2).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(blocks.reshape(h * w, 2), dtype=np.int32)
