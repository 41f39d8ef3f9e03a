"""What all towers share: patches in, residual blocks, merged tokens out.

Shapes: T patches, P values of one patch, D width, M merged tokens, O output width,
L deepstack levels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from vitrt.attention import AttentionChoice
from vitrt.config import Grid, VisionConfig
from vitrt.layers.attention import VisionAttention
from vitrt.layers.cache import ByteCache
from vitrt.layers.linear import Linear
from vitrt.layers.merger import PatchMerger
from vitrt.layers.mlp import MLP
from vitrt.layers.norm import LayerNorm, Norm, RMSNorm
from vitrt.layers.patch import PatchEmbed
from vitrt.layers.rotary import RotaryPosMixin
from vitrt.layers.side_stream import SideStream
from vitrt.layers.weights import WeightTarget
from vitrt.models.block import VisionBlock
from vitrt.models.packed_plan import DevicePlan
from vitrt.models.plan import ForwardPlan, FramePlan, build_plan, check_grids
from vitrt.parallel.context import SINGLE, ParallelContext

_FRAME_CACHE_BYTES = 64 << 20
_PLAN_CACHE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class TowerOutput:
    """What a forward leaves on the device."""

    embeddings: Tensor  # [M, O], raster order; [0, O] where none were asked for
    deepstack: Tensor | None = None  # [L, M, O]
    # One [T, D] for each layer asked for, in that order; patches in the order of `pixel_values`.
    hidden: tuple[Tensor, ...] = ()


class VisionTower(RotaryPosMixin, nn.Module):
    """A tower: `plan` on the host, `forward` on the device.

    A family's tower says what its blocks and its merger are made of, and overrides the hooks where
    it departs from full attention in every layer over patches in the order of `pixel_values`.
    """

    patch_bias = False
    norm: type[RMSNorm] | type[LayerNorm] = LayerNorm
    attention: type[VisionAttention] = VisionAttention
    mlp: type[MLP]
    # Norm and the two products of a merger, as checkpoints name them.
    merger_names: tuple[str, str, str] = ("ln_q.", "mlp.0.", "mlp.2.")

    def __init__(self, config: VisionConfig, parallel: ParallelContext = SINGLE) -> None:
        super().__init__()
        self.config = config
        self.init_rotary(config.head_dim)
        self.frames: ByteCache[tuple[int, int], FramePlan] = ByteCache(_FRAME_CACHE_BYTES)
        self.plans: ByteCache[tuple[Grid, ...], ForwardPlan] = ByteCache(_PLAN_CACHE_BYTES)
        width = config.hidden_size
        self.patch_embed = PatchEmbed(config, bias=self.patch_bias)
        self.blocks = nn.ModuleList(
            VisionBlock(
                self.norm(width),
                self.attention(config, parallel),
                self.norm(width),
                self.mlp(config, parallel),
            )
            for _ in range(config.depth)
        )
        self.merger_norm: Norm = self.norm(width)
        self.merger = PatchMerger(config, parallel, names=self.merger_names[1:])

    # Hooks

    def plan_frame(self, h: int, w: int) -> FramePlan:
        """The plan of one frame of h x w patches."""
        positions = self.rotary_position_ids(h, w, self.config.spatial_merge_size)
        return FramePlan(positions, None, None, None, None)

    def in_windows(self, index: int) -> bool:
        """Whether layer `index` attends within windows, else over whole frames."""
        return False

    def add_positions_(self, residual: Tensor, plan: DevicePlan) -> None:
        """Add learned positions to the embedded patches [T, D], float32, in place."""

    def new_deepstack(self, patches: Tensor) -> Tensor | None:
        """Memory for the deepstack levels [L, M, O]; None for a tower that has none."""
        return None

    def write_deepstack_(
        self, index: int, residual: Tensor, deepstack: Tensor, side_stream: SideStream | None
    ) -> None:
        """Write the deepstack level that is taken after layer `index`, if one is."""

    # Host

    def plan(self, grid_thw: Sequence[Sequence[int]]) -> ForwardPlan:
        """The plan of a batch of (t, h, w) grids in patches, cached.

        ValueError for a grid that no tower can take.
        """
        grids = check_grids(grid_thw, self.config.spatial_merge_size)
        return self.plans.get(grids, lambda: self._build(grids))

    def _build(self, grids: tuple[Grid, ...]) -> ForwardPlan:
        frames = [self.frames.get((h, w), partial(self.plan_frame, h, w)) for _, h, w in grids]
        return build_plan(
            grids, frames, merge_unit=self.config.merge_unit, window_patches=self.window_patches
        )

    @property
    def window_patches(self) -> int:
        """The most patches of one attention window; 0 for a tower without windows."""
        cells = self.config.window_cells
        return 0 if cells is None else cells**2 * self.config.merge_unit

    # Device

    def forward(
        self,
        patches: Tensor,
        plan: DevicePlan,
        attention: AttentionChoice,
        keep_hidden: Sequence[int] = (),
        *,
        merged: bool = True,
        side_stream: SideStream | None = None,
    ) -> TowerOutput:
        """The output for `patches` [T, P] in the plan's order.

        `keep_hidden` asks for the hidden states after those layers; without `merged` they are all
        that comes out, and the last one ends the forward. What no block waits for runs on
        `side_stream`, inside whose `with` block this is called.
        """
        rotary = self.rotary(plan.positions, plan.valid, plan.largest_position)
        deepstack = self.new_deepstack(patches) if merged else None
        residual = self.patch_embed(patches).float()
        self.add_positions_(residual, plan)
        normed = self.block(0).norm1(residual)
        hidden: dict[int, Tensor] = {}
        for index in range(self.config.depth if merged else max(keep_hidden) + 1):
            segments, backend = plan.full, attention.full
            if self.in_windows(index):
                assert plan.window is not None
                segments, backend = plan.window, attention.window
            block, next_norm = self.block(index), self.norm_after(index)
            normed = block(residual, normed, rotary, segments, backend, next_norm)
            if deepstack is not None:
                self.write_deepstack_(index, residual, deepstack, side_stream)
            if index in keep_hidden:
                hidden[index] = residual.to(patches.dtype, copy=True)
        kept = tuple(hidden[index] for index in keep_hidden)
        embeddings = self.merger(normed) if merged else None
        if plan.inverse is not None:  # the tower ran in another order
            kept = tuple(states.index_select(0, plan.hidden_inverse) for states in kept)
            embeddings = None if embeddings is None else embeddings.index_select(0, plan.inverse)
        if embeddings is None:
            embeddings = patches.new_empty(0, self.config.out_hidden_size)
        return TowerOutput(embeddings, deepstack, kept)

    def block(self, index: int) -> VisionBlock:
        return cast(VisionBlock, self.blocks[index])

    def norm_after(self, index: int) -> Norm:
        """The norm that follows layer `index`: the next block's, or the merger's."""
        last = index + 1 == self.config.depth
        return self.merger_norm if last else self.block(index + 1).norm1

    # Weights

    def allocate(self, memory: Callable[[nn.Parameter], Tensor]) -> None:
        """Replace every parameter by the memory that is given for it, which need not be filled.

        (`nn.Module.to_empty` would import sympy for it, for half a second and more.)
        """
        for module in self.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(memory(parameter), requires_grad=False))

    def use_float8(self, skip_blocks: int) -> None:
        """Run the linear layers of all blocks but the first ones in e4m3; see layers/float8.py.

        ValueError for a tower that tensor-parallel ranks share.
        """
        if self.block(0).attn.proj.parallel.tp_size > 1:
            raise ValueError("precision 'fp8' runs on whole towers only; use tp 1, or another one")
        with torch.no_grad():
            for index in range(skip_blocks, self.config.depth):
                self.block(index).use_float8()

    def fix_products(self) -> None:
        """Run every product by one kernel and tile whatever the rows: features then do not depend
        on what else is in a batch. ValueError for a tower that tensor-parallel ranks share.
        """
        if self.block(0).attn.proj.parallel.tp_size > 1:
            raise ValueError(
                "batch_invariant runs on whole towers only: how ranks sum goes by the size of a "
                "batch; use tp 1, or leave it off"
            )
        for module in self.modules():
            if isinstance(module, Linear):
                module.fixed = True

    def compile_kernels(self) -> None:
        """Compile the kernels of all products, once a shape."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.compile_kernels()

    def weight_targets(self) -> Iterator[WeightTarget]:
        """Every tensor of the checkpoint's tower, once."""
        yield from self.patch_embed.weight_targets("patch_embed.")
        for index in range(self.config.depth):
            yield from self.block(index).weight_targets(f"blocks.{index}.")
        yield from self.merger_norm.weight_targets(f"merger.{self.merger_names[0]}")
        yield from self.merger.weight_targets("merger.")
