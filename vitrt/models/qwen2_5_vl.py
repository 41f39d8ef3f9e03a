"""The vision tower of Qwen2.5-VL: window attention in most layers, full attention in a few.

The tower runs in window order, so that every window is a run of neighbouring patches; merged tokens
go back to raster order at the end.
"""

from __future__ import annotations

from vitrt.layers.mlp import SwiGLU
from vitrt.layers.norm import RMSNorm
from vitrt.models.plan import FramePlan, window_order
from vitrt.models.tower import VisionTower


class Qwen25VLVisionTower(VisionTower):
    """patch embed -> blocks in window order -> merger -> raster order."""

    norm = RMSNorm
    mlp = SwiGLU

    def in_windows(self, index: int) -> bool:
        return index not in self.config.fullatt_block_indexes

    def plan_frame(self, h: int, w: int) -> FramePlan:
        merge, unit = self.config.spatial_merge_size, self.config.merge_unit
        assert self.config.window_cells is not None
        order, lengths = window_order(h // merge, w // merge, self.config.window_cells)
        positions = self.rotary_position_ids(h, w, merge)
        positions = positions.reshape(-1, unit, 2)[order].reshape(-1, 2)
        return FramePlan(positions, lengths * unit, order, None, None)
