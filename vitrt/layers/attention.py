"""Self-attention of one block: fused qkv product, rotary embedding, a backend, output product.

Shapes: T patches, D width, H heads on this rank, Dh head size.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from vitrt.attention import AttentionBackend, attention_shape
from vitrt.config import VisionConfig
from vitrt.kernels.rope import rope_
from vitrt.kernels.segments import Rotary, Segments
from vitrt.layers.fused import FusedQKVLinear
from vitrt.layers.linear import RowParallelLinear
from vitrt.layers.norm import Norm
from vitrt.layers.weights import WeightTarget
from vitrt.parallel.context import ParallelContext


class VisionAttention(nn.Module):
    """Attention within the given segments; the plan knows what they mean."""

    def __init__(self, config: VisionConfig, parallel: ParallelContext) -> None:
        super().__init__()
        width = config.hidden_size
        self.qkv = FusedQKVLinear(width, config.num_heads, parallel=parallel)
        self.proj = RowParallelLinear(width, width, adds_residual=True, parallel=parallel)

    @property
    def heads(self) -> int:
        """Heads on this rank."""
        return self.qkv.output_shape[1]

    def forward(
        self,
        normed: Tensor,
        rotary: Rotary,
        segments: Segments,
        backend: AttentionBackend,
        spare: Tensor | None = None,
    ) -> Tensor:
        """[T, D] -> [T, H * Dh], before the output product.

        The result takes `spare` where it fits, which may be `normed`.
        """
        qkv = self.qkv(normed)
        if not backend.applies_rotary:
            rope_(qkv, rotary)
        if spare is not None and (spare.shape, spare.dtype) != (attention_shape(qkv), qkv.dtype):
            spare = None  # a rank that has some of the heads, or a norm in e4m3
        return backend(qkv, segments, rotary, spare)

    def add_norm_(
        self, residual: Tensor, attended: Tensor, norm: Norm, spare: Tensor | None = None
    ) -> Tensor:
        """residual += proj(attended) in place; returns its norm, all [T, D].

        The result may take `spare`, which may be `attended`.
        """
        return self.proj.add_norm_(residual, attended, norm, spare)

    def weight_targets(self, prefix: str) -> Iterator[WeightTarget]:
        yield from self.qkv.weight_targets(f"{prefix}qkv.")
        yield from self.proj.weight_targets(f"{prefix}proj.")


class SeparateQKVAttention(VisionAttention):
    """The attention of towers whose checkpoints hold q, k and v apart."""

    def weight_targets(self, prefix: str) -> Iterator[WeightTarget]:
        yield from self.qkv.separate_targets(prefix)
        yield from self.proj.weight_targets(f"{prefix}proj.")
