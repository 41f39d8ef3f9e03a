"""The table model_type -> tower."""

from __future__ import annotations

from vitrt.config import QWEN2_5_VL, QWEN3_VL, QWEN3_VL_MOE, VisionConfig
from vitrt.models.qwen2_5_vl import Qwen25VLVisionTower
from vitrt.models.qwen3_vl import Qwen3VLVisionTower
from vitrt.models.tower import VisionTower
from vitrt.parallel.context import SINGLE, ParallelContext

TOWERS: dict[str, type[Qwen25VLVisionTower] | type[Qwen3VLVisionTower]] = {
    QWEN2_5_VL: Qwen25VLVisionTower,
    QWEN3_VL: Qwen3VLVisionTower,
    QWEN3_VL_MOE: Qwen3VLVisionTower,
}


def build_tower(config: VisionConfig, parallel: ParallelContext = SINGLE) -> VisionTower:
    """The tower of `config.model_type`, its parameters not yet filled."""
    return TOWERS[config.model_type](config, parallel)


__all__ = ["TOWERS", "build_tower", "packed_plan", "plan", "tower", "work"]
