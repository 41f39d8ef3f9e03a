"""The vision tower of Qwen3-Omni: Qwen3-VL's, its mergers under other names."""

from __future__ import annotations

from vitrt.models.qwen3_vl import Qwen3VLVisionTower


class Qwen3OmniVisionTower(Qwen3VLVisionTower):
    """patch embed + interpolated positions -> blocks, tapped by deepstack mergers -> merger."""

    merger_names = ("ln_q.", "mlp.0.", "mlp.2.")
    deepstack_name = "merger_list"
