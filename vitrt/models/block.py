"""The residual block that all towers are made of.

Shapes: T patches, D width.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from vitrt.attention import AttentionBackend
from vitrt.kernels.segments import Rotary, Segments
from vitrt.layers.attention import VisionAttention
from vitrt.layers.float8 import Float8Norm, Float8Weight, product_bound, scale_for
from vitrt.layers.mlp import MLP
from vitrt.layers.norm import Norm
from vitrt.layers.weights import WeightTarget


class VisionBlock(nn.Module):
    """norm1, attention, residual; norm2, MLP, residual. An add and the norm after it are one."""

    def __init__(self, norm1: Norm, attn: VisionAttention, norm2: Norm, mlp: MLP) -> None:
        super().__init__()
        self.norm1 = norm1
        self.attn = attn
        self.norm2 = norm2
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
        # A norm is not read again after the product that it goes into: its memory takes attention's
        # result and the norms that follow. (Functions for CPUs would only copy theirs into it.)
        spare = normed if normed.is_cuda else None
        attended = self.attn(normed, rotary, segments, backend, spare)
        if spare is not None and spare.dtype != attended.dtype:
            spare = None  # a norm in e4m3
        if self.attn.proj.parallel.overlaps(len(residual)):
            return self._in_halves(residual, attended, next_norm)
        normed = self.attn.add_norm_(residual, attended, self.norm2, spare)
        return self.mlp.add_norm_(residual, normed, next_norm, spare)

    def _in_halves(self, residual: Tensor, attended: Tensor, next_norm: Norm) -> Tensor:
        """The block from attention's output product on, in two halves of the rows.

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

    def use_float8(self) -> None:
        """Let the four products run on e4m3 operands, by bounds on what each is given."""
        qkv, proj, up, down = self.attn.qkv, self.attn.proj, self.mlp.up, self.mlp.down
        norm1 = Float8Norm.of(self.norm1.weight, self.norm1.bias)
        norm2 = Float8Norm.of(self.norm2.weight, self.norm2.bias)
        # Attention leaves averages of v, the last third of qkv; every GELU shrinks.
        v = product_bound(self.norm1, qkv.weight, qkv.bias)[-proj.in_features :]
        inner = product_bound(self.norm2, up.weight, up.bias)
        gated = self.mlp.activation == "swiglu"
        if gated:
            inner = inner.view(-1, 2).prod(dim=1)  # silu(gate) is at most the gate
        attended, activated = scale_for(v), scale_for(inner)
        self.norm1.float8, self.norm2.float8 = norm1, norm2
        qkv.float8 = Float8Weight.of(qkv.weight, qkv.bias, norm1.scale)
        proj.float8 = Float8Weight.of(proj.weight, proj.bias, attended)
        up.float8 = Float8Weight.of(up.weight, up.bias, norm2.scale, None if gated else activated)
        down.float8 = Float8Weight.of(down.weight, down.bias, activated)

    def weight_targets(self, prefix: str) -> Iterator[WeightTarget]:
        yield from self.norm1.weight_targets(f"{prefix}norm1.")
        yield from self.attn.weight_targets(f"{prefix}attn.")
        yield from self.norm2.weight_targets(f"{prefix}norm2.")
        yield from self.mlp.weight_targets(f"{prefix}mlp.")
