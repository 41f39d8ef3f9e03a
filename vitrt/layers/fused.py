"""Linear layers that are one product here and several in a checkpoint: qkv, and gate and up.

Shapes: T rows, K input and N output features of the whole layer, tp ranks, H heads, Dh head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from vitrt.layers.linear import Linear, clipped, rows_into, shard
from vitrt.layers.weights import TensorSlice, WeightTarget, partly
from vitrt.parallel.context import SINGLE, ParallelContext


class FusedQKVLinear(Linear):
    """q, k and v as one product [T, 3, H / tp, Dh]: each of the three split by heads."""

    def __init__(self, width: int, num_heads: int, *, parallel: ParallelContext = SINGLE) -> None:
        if num_heads % parallel.tp_size:
            raise ValueError(
                f"tp = {parallel.tp_size} does not divide the {num_heads} attention heads of this "
                "tower; every rank takes the same number of them"
            )
        super().__init__(width, 3 * width // parallel.tp_size)
        self.width = width
        # A head's rows are neighbours, so a share of the heads is a slice of rows.
        self.part = shard(width, parallel)
        self.output_shape = (3, num_heads // parallel.tp_size, width // num_heads)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).view(x.shape[0], *self.output_shape)

    def weight_targets(self, prefix: str) -> Iterator[WeightTarget]:
        for name, target in self.tensors():
            shape = (3 * self.width, *target.shape[1:])
            yield partly(prefix + name, target, shape, self._heads_into(target))

    def separate_targets(self, prefix: str) -> Iterator[WeightTarget]:
        """The targets of checkpoints that hold q, k and v apart."""
        for index, projection in enumerate("qkv"):
            for name, target in self.tensors():
                block = target.view(3, -1, *target.shape[1:])[index]
                store = rows_into(block, self.part)
                shape = (self.width, *target.shape[1:])
                yield WeightTarget(f"{prefix}{projection}.{name}", shape, store)

    def _heads_into(self, target: Tensor) -> Callable[[TensorSlice], None]:
        def store(source: TensorSlice) -> None:
            for index, block in enumerate(target.view(3, -1, *target.shape[1:])):
                first = index * self.width
                block.copy_(source[first + self.part.start : first + self.part.stop])

        return store


class GateUpLinear(Linear):
    """silu(x Wg^T + bg) * (x Wu^T + bu) as one product, its rows interleaved g0, u0, g1, u1, ...

    Interleaved, a gate and its up value meet in one tile of the product, where the epilogue
    multiplies them.
    """

    def __init__(
        self, in_features: int, width: int, *, padded: int, parallel: ParallelContext = SINGLE
    ) -> None:
        super().__init__(in_features, 2 * padded // parallel.tp_size, activation="swiglu")
        self.width = width
        self.part = shard(padded, parallel)

    def weight_targets(self, prefix: str) -> Iterator[WeightTarget]:
        rows = clipped(self.part, self.width)
        for index, projection in enumerate(("gate_proj", "up_proj")):
            for name, target in self.tensors():
                shape = (self.width, *target.shape[1:])
                store = rows_into(target.view(-1, 2, *target.shape[1:])[:, index], rows)
                yield WeightTarget(f"{prefix}{projection}.{name}", shape, store)
