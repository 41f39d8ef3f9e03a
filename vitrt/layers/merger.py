"""Mergers: the merge x merge patches of one token become one row of the language model's width.

Shapes: T patches, M = T / merge^2 merged tokens, D width, O output width.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from vitrt.config import VisionConfig
from vitrt.layers.linear import ColumnParallelLinear, RowParallelLinear
from vitrt.layers.norm import LayerNorm
from vitrt.layers.weights import WeightTarget
from vitrt.parallel.context import ParallelContext


class PatchMerger(nn.Module):
    """fc2(gelu(fc1(x))) over the joined width; GELU is the exact one (erf) here.

    The norm in front belongs to the tower: over D it rides on the last block's residual add.
    """

    def __init__(
        self, config: VisionConfig, parallel: ParallelContext, *, names: tuple[str, str]
    ) -> None:
        super().__init__()
        self.joined = config.hidden_size * config.merge_unit
        self.fc1 = ColumnParallelLinear(
            self.joined, self.joined, activation="gelu", parallel=parallel
        )
        self.fc2 = RowParallelLinear(self.joined, config.out_hidden_size, parallel=parallel)
        self.names = names

    def forward(self, normed: Tensor, out: Tensor | None = None) -> Tensor:
        """Normed patches [T, D] or tokens [M, D * merge^2] -> [M, O], in `out` where given."""
        return self.fc2(self.fc1(normed.view(-1, self.joined)), out=out)

    def weight_targets(self, prefix: str) -> Iterator[WeightTarget]:
        yield from self.fc1.weight_targets(prefix + self.names[0])
        yield from self.fc2.weight_targets(prefix + self.names[1])


class DeepstackMerger(PatchMerger):
    """A merger on the output of an inner layer, with LayerNorm AFTER the join, over D * merge^2."""

    def __init__(
        self, config: VisionConfig, parallel: ParallelContext, *, names: tuple[str, str, str]
    ) -> None:
        """`names`: those of the norm and of the two products in a checkpoint."""
        super().__init__(config, parallel, names=names[1:])
        self.norm_name = names[0]
        self.norm = LayerNorm(self.joined)

    def normed(self, residual: Tensor) -> Tensor:
        """Hidden states [T, D], float32 -> what `forward` takes, [M, D * merge^2]."""
        normed: Tensor = self.norm(residual.view(-1, self.joined))
        return normed

    def weight_targets(self, prefix: str) -> Iterator[WeightTarget]:
        yield from self.norm.weight_targets(prefix + self.norm_name)
        yield from super().weight_targets(prefix)
