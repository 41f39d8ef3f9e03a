"""The vision tower of Qwen3-VL (dense and MoE): learned positions, full attention, deepstack.

Shapes: T patches, P values of one patch, D width, M merged tokens, O output width,
L deepstack levels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isqrt
from typing import cast

import torch
from torch import Tensor, nn

from vitrt.attention import AttentionChoice
from vitrt.config import VisionConfig
from vitrt.kernels.pos_embed import add_position_embedding_
from vitrt.layers.merger import DeepstackMerger, PatchMerger
from vitrt.layers.mlp import GeluMLP
from vitrt.layers.norm import LayerNorm, Norm
from vitrt.layers.patch import PatchEmbed
from vitrt.layers.weights import WeightTarget, whole
from vitrt.models.packed_plan import DevicePlan
from vitrt.models.plan import FramePlan, position_taps
from vitrt.models.tower import TowerOutput, VisionBlock, VisionTower
from vitrt.parallel.context import SINGLE, ParallelContext


class Qwen3VLVisionTower(VisionTower):
    """patch embed + interpolated positions -> blocks, tapped by deepstack mergers -> merger."""

    def __init__(self, config: VisionConfig, parallel: ParallelContext = SINGLE) -> None:
        super().__init__(config)
        assert config.num_position_embeddings is not None
        self.table_side = isqrt(config.num_position_embeddings)
        self.patch_embed = PatchEmbed(config, bias=True)
        self.pos_embed = nn.Parameter(
            torch.empty(config.num_position_embeddings, config.hidden_size), requires_grad=False
        )
        self.blocks = nn.ModuleList(
            VisionBlock(config, parallel, LayerNorm, GeluMLP(config, parallel))
            for _ in range(config.depth)
        )
        self.merger_norm = LayerNorm(config.hidden_size)
        self.merger = PatchMerger(config, parallel, names=("linear_fc1.", "linear_fc2."))
        self.deepstack_mergers = nn.ModuleList(
            DeepstackMerger(config, parallel) for _ in config.deepstack_visual_indexes
        )

    def deepstack_merger(self, level: int) -> DeepstackMerger:
        return cast(DeepstackMerger, self.deepstack_mergers[level])

    @property
    def final_norm(self) -> Norm:
        return self.merger_norm

    def plan_frame(self, h: int, w: int) -> FramePlan:
        positions = self.rotary_position_ids(h, w, self.config.spatial_merge_size)
        taps, weights = position_taps(positions, h, w, self.table_side)
        return FramePlan(positions, None, None, taps, weights)

    def forward(
        self,
        patches: Tensor,
        plan: DevicePlan,
        attention: AttentionChoice,
        keep_hidden: Sequence[int] = (),
        *,
        merged: bool = True,
    ) -> TowerOutput:
        assert plan.taps is not None and plan.tap_weights is not None
        levels = self.config.deepstack_visual_indexes if merged else ()
        tokens = patches.shape[0] // self.config.merge_unit
        deepstack = patches.new_empty(len(levels), tokens, self.config.out_hidden_size)
        rotary = self.rotary(plan.positions, plan.valid, plan.largest_position)

        residual = self.patch_embed(patches).float()
        add_position_embedding_(residual, self.pos_embed, plan.taps, plan.tap_weights)
        normed = self.block(0).norm1(residual)
        hidden: dict[int, Tensor] = {}
        for index in self.layers_to_run(keep_hidden, merged):
            normed = self.run_block(index, residual, normed, rotary, plan.full, attention.full)
            if index in levels:
                level = levels.index(index)
                self.deepstack_merger(level)(residual, out=deepstack[level])
            if index in keep_hidden:
                hidden[index] = residual.to(patches.dtype, copy=True)
        kept = tuple(hidden[index] for index in keep_hidden)
        if not merged:
            return self.unmerged(kept)
        embeddings = self.merger(normed)
        return TowerOutput(embeddings, deepstack if levels else None, kept)

    def weight_targets(self) -> Iterator[WeightTarget]:
        yield from self.patch_embed.weight_targets("patch_embed.")
        yield whole("pos_embed.weight", self.pos_embed)
        for index in range(len(self.blocks)):
            yield from self.block(index).weight_targets(f"blocks.{index}.")
        yield from self.merger_norm.weight_targets("merger.norm.")
        yield from self.merger.weight_targets("merger.")
        for level in range(len(self.deepstack_mergers)):
            yield from self.deepstack_merger(level).weight_targets(
                f"deepstack_merger_list.{level}."
            )
