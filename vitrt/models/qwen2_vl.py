"""The vision tower of Qwen2-VL: full attention in every layer, and no learned positions."""

from __future__ import annotations

from vitrt.layers.mlp import QuickGeluMLP
from vitrt.models.tower import VisionTower


class Qwen2VLVisionTower(VisionTower):
    """patch embed -> blocks -> merger."""

    mlp = QuickGeluMLP
