"""The vision tower of Qwen2.5-VL: window attention in most layers, full attention in a few.

The tower runs in window order, so that every window is a run of neighbouring patches; merged tokens
go back to raster order at the end.

Shapes: T patches, P values of one patch, D width, M merged tokens, O output width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from vitrt.attention import AttentionChoice
from vitrt.config import VisionConfig
from vitrt.layers.merger import PatchMerger
from vitrt.layers.mlp import SwiGLU
from vitrt.layers.norm import Norm, RMSNorm
from vitrt.layers.patch import PatchEmbed
from vitrt.layers.weights import WeightTarget
from vitrt.models.packed_plan import DevicePlan
from vitrt.models.plan import FramePlan, window_order
from vitrt.models.tower import TowerOutput, VisionBlock, VisionTower
from vitrt.parallel.context import SINGLE, ParallelContext


class Qwen25VLVisionTower(VisionTower):
    """patch embed -> blocks in window order -> merger -> raster order."""

    def __init__(self, config: VisionConfig, parallel: ParallelContext = SINGLE) -> None:
        super().__init__(config)
        self.patch_embed = PatchEmbed(config, bias=False)
        self.blocks = nn.ModuleList(
            VisionBlock(config, parallel, RMSNorm, SwiGLU(config, parallel))
            for _ in range(config.depth)
        )
        self.merger_norm = RMSNorm(config.hidden_size)
        self.merger = PatchMerger(config, parallel, names=("mlp.0.", "mlp.2."))

    @property
    def final_norm(self) -> Norm:
        return self.merger_norm

    def plan_frame(self, h: int, w: int) -> FramePlan:
        merge, unit = self.config.spatial_merge_size, self.config.merge_unit
        assert self.config.window_cells is not None
        order, lengths = window_order(h // merge, w // merge, self.config.window_cells)
        positions = self.rotary_position_ids(h, w, merge)
        positions = positions.reshape(-1, unit, 2)[order].reshape(-1, 2)
        return FramePlan(positions, lengths * unit, order, None, None)

    def forward(
        self,
        patches: Tensor,
        plan: DevicePlan,
        attention: AttentionChoice,
        keep_hidden: Sequence[int] = (),
        *,
        merged: bool = True,
    ) -> TowerOutput:
        assert plan.window is not None and plan.inverse is not None
        rotary = self.rotary(plan.positions, plan.valid, plan.largest_position)
        residual = self.patch_embed(patches).float()
        normed = self.block(0).norm1(residual)
        hidden: dict[int, Tensor] = {}
        for index in self.layers_to_run(keep_hidden, merged):
            full = index in self.config.fullatt_block_indexes
            segments = plan.full if full else plan.window
            backend = attention.full if full else attention.window
            normed = self.run_block(index, residual, normed, rotary, segments, backend)
            if index in keep_hidden:
                hidden[index] = residual.to(patches.dtype, copy=True)
        kept = tuple(hidden[index].index_select(0, plan.hidden_inverse) for index in keep_hidden)
        if not merged:
            return self.unmerged(kept)
        embeddings = self.merger(normed).index_select(0, plan.inverse)
        return TowerOutput(embeddings, None, kept)

    def weight_targets(self) -> Iterator[WeightTarget]:
        yield from self.patch_embed.weight_targets("patch_embed.")
        for index in range(len(self.blocks)):
            yield from self.block(index).weight_targets(f"blocks.{index}.")
        yield from self.merger_norm.weight_targets("merger.ln_q.")
        yield from self.merger.weight_targets("merger.")
