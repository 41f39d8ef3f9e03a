"""The vision tower of Qwen3-VL and later: learned positions, full attention, deepstack.

Qwen3.5 and later list no deepstack layer, and are the same tower otherwise.

Shapes: T patches, D width, M merged tokens, O output width, L deepstack levels.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from math import isqrt
from typing import cast

import torch
from torch import Tensor, nn

from vitrt.config import VisionConfig
from vitrt.kernels.pos_embed import add_position_embedding_
from vitrt.layers.merger import DeepstackMerger
from vitrt.layers.mlp import GeluTanhMLP
from vitrt.layers.side_stream import SideStream
from vitrt.layers.weights import WeightTarget, whole
from vitrt.models.packed_plan import DevicePlan
from vitrt.models.plan import FramePlan, position_taps
from vitrt.models.tower import VisionTower
from vitrt.parallel.context import SINGLE, ParallelContext


class Qwen3VLVisionTower(VisionTower):
    """patch embed + interpolated positions -> blocks, tapped by deepstack mergers -> merger."""

    patch_bias = True
    mlp = GeluTanhMLP
    merger_names = ("norm.", "linear_fc1.", "linear_fc2.")
    deepstack_name = "deepstack_merger_list"

    def __init__(self, config: VisionConfig, parallel: ParallelContext = SINGLE) -> None:
        super().__init__(config, parallel)
        assert config.num_position_embeddings is not None
        self.table_side = isqrt(config.num_position_embeddings)
        self.pos_embed = nn.Parameter(
            torch.empty(config.num_position_embeddings, config.hidden_size), requires_grad=False
        )
        self.deepstack_mergers = nn.ModuleList(
            DeepstackMerger(config, parallel, names=self.merger_names)
            for _ in config.deepstack_visual_indexes
        )

    def deepstack_merger(self, level: int) -> DeepstackMerger:
        return cast(DeepstackMerger, self.deepstack_mergers[level])

    def plan_frame(self, h: int, w: int) -> FramePlan:
        positions = self.rotary_position_ids(h, w, self.config.spatial_merge_size)
        taps, weights = position_taps(positions, h, w, self.table_side)
        return FramePlan(positions, None, None, taps, weights)

    def add_positions_(self, residual: Tensor, plan: DevicePlan) -> None:
        assert plan.taps is not None and plan.tap_weights is not None
        add_position_embedding_(residual, self.pos_embed, plan.taps, plan.tap_weights)

    def new_deepstack(self, patches: Tensor) -> Tensor | None:
        levels, tokens = len(self.deepstack_mergers), len(patches) // self.config.merge_unit
        return patches.new_empty(levels, tokens, self.config.out_hidden_size) if levels else None

    def write_deepstack_(
        self, index: int, residual: Tensor, deepstack: Tensor, side_stream: SideStream | None
    ) -> None:
        if index not in self.config.deepstack_visual_indexes:
            return
        level = self.config.deepstack_visual_indexes.index(index)
        merger = self.deepstack_merger(level)
        merge = partial(merger, out=deepstack[level])
        normed = merger.normed(residual)  # before the next block adds to it
        if side_stream is None:
            merge(normed)
        else:
            side_stream.run(merge, normed)

    def weight_targets(self) -> Iterator[WeightTarget]:
        yield from super().weight_targets()
        yield whole("pos_embed.weight", self.pos_embed)
        for level in range(len(self.deepstack_mergers)):
            merger = self.deepstack_merger(level)
            yield from merger.weight_targets(f"{self.deepstack_name}.{level}.")
