"""The MLPs: SwiGLU (Qwen2.5-VL), and fc1, an activation, fc2. All are `up` then `down`.

Shapes: T patches, D width, F MLP width after padding.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from vitrt.config import VisionConfig
from vitrt.kernels.gemm import Activation
from vitrt.layers.fused import GateUpLinear
from vitrt.layers.linear import ColumnParallelLinear, RowParallelLinear, padded_width
from vitrt.layers.norm import Norm
from vitrt.layers.weights import WeightTarget
from vitrt.parallel.context import ParallelContext


class MLP(nn.Module):
    """`up` [T, D] -> [T, F / tp], activation included; `down` [T, F / tp] -> [T, D]."""

    activation: Activation
    up_name: str  # prefixes of the two in a checkpoint
    down_name: str

    def __init__(self, config: VisionConfig, parallel: ParallelContext) -> None:
        super().__init__()
        width, hidden = config.intermediate_size, config.hidden_size
        padded = padded_width(width, parallel.tp_size)
        self.up = self.make_up(hidden, width, padded, parallel)
        self.down = RowParallelLinear(
            width, hidden, padded=padded, adds_residual=True, parallel=parallel
        )

    def make_up(
        self, hidden: int, width: int, padded: int, parallel: ParallelContext
    ) -> ColumnParallelLinear | GateUpLinear:
        return ColumnParallelLinear(
            hidden, width, activation=self.activation, padded=padded, parallel=parallel
        )

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


class GeluTanhMLP(MLP):
    """fc2(gelu_tanh(fc1(x)))."""

    activation: Activation = "gelu_tanh"
    up_name, down_name = "linear_fc1.", "linear_fc2."


class QuickGeluMLP(MLP):
    """fc2(quick_gelu(fc1(x)))."""

    activation: Activation = "quick_gelu"
    up_name, down_name = "fc1.", "fc2."


class SwiGLU(MLP):
    """down(silu(gate(x)) * up(x))."""

    activation: Activation = "swiglu"
    up_name, down_name = "", "down_proj."

    def make_up(
        self, hidden: int, width: int, padded: int, parallel: ParallelContext
    ) -> GateUpLinear:
        return GateUpLinear(hidden, width, padded=padded, parallel=parallel)
