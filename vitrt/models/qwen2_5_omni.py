"""The vision tower of Qwen2.5-Omni: Qwen2.5-VL's, its checkpoints holding q, k and v apart."""

from __future__ import annotations

from vitrt.layers.attention import SeparateQKVAttention
from vitrt.models.qwen2_5_vl import Qwen25VLVisionTower


class Qwen25OmniVisionTower(Qwen25VLVisionTower):
    """patch embed -> blocks in window order -> merger -> raster order."""

    attention = SeparateQKVAttention
