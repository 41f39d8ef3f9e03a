"""What the towers of both families share: patches in, residual blocks, merged tokens out.

Shapes: T patches, P values of one patch, D width, M merged tokens, O output width,
L deepstack levels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

from torch import Tensor, nn

from vitrt.attention import AttentionBackend, AttentionChoice
from vitrt.config import VisionConfig
from vitrt.kernels.segments import Rotary, Segments
from vitrt.layers.attention import VisionAttention
from vitrt.layers.cache import ByteCache
from vitrt.layers.linear import Linear
from vitrt.layers.mlp import MLP
from vitrt.layers.norm import LayerNorm, Norm, RMSNorm
from vitrt.layers.patch import PatchEmbed
from vitrt.layers.rotary import RotaryPosMixin
from vitrt.layers.weights import WeightTarget
from vitrt.models.packed_plan import DevicePlan
from vitrt.models.plan import ForwardPlan, FramePlan, Grid, build_plan, check_grids
from vitrt.parallel.context import ParallelContext

_FRAME_CACHE_BYTES = 64 << 20
_PLAN_CACHE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class TowerOutput:
    """What a forward leaves on the device."""

    embeddings: Tensor  # [M, O], raster order; [0, O] where none were asked for
    deepstack: Tensor | None = None  # [L, M, O]
    # One [T, D] for each layer asked for, in that order; patches in the order of `pixel_values`.
    hidden: tuple[Tensor, ...] = ()


class VisionBlock(nn.Module):
    """norm1, attention, residual; norm2, MLP, residual. A norm rides behind the add it follows."""

    def __init__(
        self,
        config: VisionConfig,
        parallel: ParallelContext,
        norm: type[RMSNorm] | type[LayerNorm],
        mlp: MLP,
    ) -> None:
        super().__init__()
        self.norm1 = norm(config.hidden_size)
        self.attn = VisionAttention(config, parallel)
        self.norm2 = norm(config.hidden_size)
        self.mlp = mlp

    def forward(
        self,
        residual: Tensor,
        normed: Tensor,
        rotary: Rotary,
        segments: Segments,
        backend: AttentionBackend,
        next_norm: Norm,
    ) -> Tensor:
        """Add to the hidden states [T, D] in place, given their norm1; returns their next norm.

        The hidden states are float32 whatever the products run in: rounding them after each of two
        adds a layer is most of the error of a tower in bfloat16.
        """
        # Nobody reads a norm again behind the product it goes into: its memory takes attention's
        # result and the norms that follow. (Functions for CPUs would only copy theirs into it.)
        spare = normed if normed.is_cuda else None
        attended = self.attn(normed, rotary, segments, backend, spare)
        if self.attn.proj.parallel.overlaps(len(residual)):
            return self._in_halves(residual, attended, next_norm)
        normed = self.attn.add_norm_(residual, attended, self.norm2, spare)
        return self.mlp.add_norm_(residual, normed, next_norm, spare)

    def _in_halves(self, residual: Tensor, attended: Tensor, next_norm: Norm) -> Tensor:
        """The block from its output product on, in two halves of the rows, which do not meet there.

        One half is computed while the other is summed over the ranks.
        """
        proj, down = self.attn.proj, self.mlp.down
        middle = len(residual) // 2
        middle -= middle % 128 if middle > 128 else 0  # whole tiles of the products
        halves = slice(middle), slice(middle, None)
        attended_out, out = (attended.new_empty(residual.shape) for _ in range(2))
        sums = [proj.start(attended[rows], attended_out[rows]) for rows in halves]
        for index, rows in enumerate(halves):
            sums[index].wait()
            normed = self.norm2.add_(residual[rows], attended_out[rows], proj.bias)
            sums[index] = down.start(self.mlp.up(normed), out[rows])
        for index, rows in enumerate(halves):
            sums[index].wait()
            next_norm.add_(residual[rows], out[rows], down.bias)
        return out

    def weight_targets(self, prefix: str) -> Iterator[WeightTarget]:
        yield from self.norm1.weight_targets(f"{prefix}norm1.")
        yield from self.attn.weight_targets(f"{prefix}attn.")
        yield from self.norm2.weight_targets(f"{prefix}norm2.")
        yield from self.mlp.weight_targets(f"{prefix}mlp.")


class VisionTower(RotaryPosMixin, nn.Module):
    """A tower: `plan` on the host, `forward` on the device. Families fill in what is theirs."""

    config: VisionConfig
    patch_embed: PatchEmbed
    blocks: nn.ModuleList

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.init_rotary(config.head_dim)
        self.frames: ByteCache[tuple[int, int], FramePlan] = ByteCache(_FRAME_CACHE_BYTES)
        self.plans: ByteCache[tuple[Grid, ...], ForwardPlan] = ByteCache(_PLAN_CACHE_BYTES)

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

    def plan_frame(self, h: int, w: int) -> FramePlan:
        """The plan of one frame of h x w patches."""
        raise NotImplementedError

    # Device

    def forward(
        self,
        patches: Tensor,
        plan: DevicePlan,
        attention: AttentionChoice,
        keep_hidden: Sequence[int] = (),
        *,
        merged: bool = True,
    ) -> TowerOutput:
        """The output for `patches` [T, P] in the plan's order.

        `keep_hidden` asks for the hidden states after those layers; without `merged` they are all
        that comes out, and the last one ends the forward.
        """
        raise NotImplementedError

    def layers_to_run(self, keep_hidden: Sequence[int], merged: bool) -> range:
        """Every layer, or those up to the last whose hidden states are kept."""
        return range(len(self.blocks) if merged else max(keep_hidden) + 1)

    def unmerged(self, kept: tuple[Tensor, ...]) -> TowerOutput:
        """Hidden states without any merged token."""
        return TowerOutput(kept[0].new_empty(0, self.config.out_hidden_size), None, kept)

    def run_block(
        self,
        index: int,
        residual: Tensor,
        normed: Tensor,
        rotary: Rotary,
        segments: Segments,
        backend: AttentionBackend,
    ) -> Tensor:
        """Block `index` on `residual`, in place; returns the norm of the next block or merger."""
        last = index + 1 == len(self.blocks)
        next_norm = self.final_norm if last else self.block(index + 1).norm1
        return self.block(index)(residual, normed, rotary, segments, backend, next_norm)

    def block(self, index: int) -> VisionBlock:
        return cast(VisionBlock, self.blocks[index])

    @property
    def final_norm(self) -> Norm:
        """The norm in front of the merger."""
        raise NotImplementedError

    # Weights

    def place(self, memory: Callable[[nn.Parameter], Tensor]) -> None:
        """Replace every parameter by the memory that is given for it, which need not be filled.

        (`nn.Module.to_empty` would import sympy for it, for half a second and more.)
        """
        for module in self.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(memory(parameter), requires_grad=False))

    def prepare(self) -> None:
        """Compile the kernels of all products, once a shape."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.prepare()

    def weight_targets(self) -> Iterator[WeightTarget]:
        """Every tensor of the checkpoint's tower, once."""
        raise NotImplementedError
