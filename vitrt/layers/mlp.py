"""The two MLPs: SwiGLU (Qwen2.5-VL) and fc1, GELU (tanh), fc2 (Qwen3-VL). Both `up` then `down`.

Shapes: T patches, D width, F MLP width after padding.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from vitrt.config import VisionConfig
from vitrt.layers.linear import (
    ColumnParallelLinear,
    GateUpLinear,
    RowParallelLinear,
    padded_width,
)
from vitrt.layers.norm import Norm
from vitrt.layers.weights import WeightTarget
from vitrt.parallel.context import ParallelContext


class MLP(nn.Module):
    """`up` [T, D] -> [T, F / tp], activation included; `down` [T, F / tp] -> [T, D]."""

    up_name: str  # prefixes of the two in a checkpoint
    down_name: str

    def __init__(self, up: GateUpLinear | ColumnParallelLinear, down: RowParallelLinear) -> None:
        super().__init__()
        self.up = up
        self.down = down

    def add_norm_(
        self, residual: Tensor, normed: Tensor, norm: Norm, spare: Tensor | None = None
    ) -> Tensor:
        """residual += MLP(normed) in place; returns its norm, all [T, D].

        The result may take `spare`, which may be `normed`.
        """
        return self.down.add_norm_(residual, self.up(normed), norm, spare)

    def weight_targets(self, prefix: str) -> Iterator[WeightTarget]:
        yield from self.up.weight_targets(prefix + self.up_name)
        yield from self.down.weight_targets(prefix + self.down_name)


class SwiGLU(MLP):
    """down(silu(gate(x)) * up(x))."""

    up_name, down_name = "", "down_proj."

    def __init__(self, config: VisionConfig, parallel: ParallelContext) -> None:
        width, hidden = config.intermediate_size, config.hidden_size
        padded = padded_width(width, parallel.tp_size)
        super().__init__(
            GateUpLinear(hidden, width, padded=padded, parallel=parallel),
            RowParallelLinear(width, hidden, padded=padded, adds_residual=True, parallel=parallel),
        )


class GeluMLP(MLP):
    """fc2(gelu_tanh(fc1(x)))."""

    up_name, down_name = "linear_fc1.", "linear_fc2."

    def __init__(self, config: VisionConfig, parallel: ParallelContext) -> None:
        width, hidden = config.intermediate_size, config.hidden_size
        padded = padded_width(width, parallel.tp_size)
        super().__init__(
            ColumnParallelLinear(
                hidden, width, activation="gelu_tanh", padded=padded, parallel=parallel
            ),
            RowParallelLinear(width, hidden, padded=padded, adds_residual=True, parallel=parallel),
        )
