"""Linear layers that know their part of the tensor-parallel split, and their epilogues.

Column-parallel layers keep a slice of the output features and need no communication; a row-parallel
layer keeps a slice of the input features, and its partial products are summed over the group, the
bias added once after the sum.

Shapes: T rows, K input and N output features of the whole layer, tp ranks, H heads, Dh head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vitrt.kernels.gemm import Activation, compile_product, fuses_residual, linear, residual_shares
from vitrt.kernels.gemm_fp8 import E4M3, linear_fp8
from vitrt.kernels.gemm_fp8 import compile_product as compile_fp8
from vitrt.kernels.to_e4m3 import to_e4m3
from vitrt.layers.float8 import FEWEST_ROWS, Float8Weight
from vitrt.layers.norm import Norm
from vitrt.layers.weights import TensorSlice, WeightTarget, partly, whole
from vitrt.parallel.context import SINGLE, ParallelContext

# A product whose K is no multiple of 8 runs at a quarter of its speed; 64 fills a tile's K.
WIDTH_ALIGNMENT = 64


def padded_width(width: int, tp_size: int) -> int:
    """The MLP width after zero-padding: aligned on every rank. Aligned widths stay as they are.

    This is exact: the padded gate and up (or fc1) rows are zero, so their activations are zero
    (silu(0) * 0, or gelu(0)), and so are the padded columns of the product that follows.
    """
    if width % (16 * tp_size) == 0:
        return width
    step = WIDTH_ALIGNMENT * tp_size
    return -(-width // step) * step


def shard(width: int, parallel: ParallelContext) -> slice:
    """This rank's part of `width` features, which the group divides evenly."""
    share = width // parallel.tp_size
    return slice(parallel.tp_rank * share, (parallel.tp_rank + 1) * share)


def clipped(part: slice, width: int) -> slice:
    """`part` of the padded width, without what lies beyond the checkpoint's own `width`."""
    return slice(min(part.start, width), min(part.stop, width))


class Linear(nn.Module):
    """y = act(x W^T + b), whole on every rank. Fills `weight` [N, K] and `bias` [N]."""

    float8: Float8Weight | None = None  # for x in e4m3
    fixed = False  # whether one kernel and tile runs it whatever the rows; see gemm.linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        activation: Activation = None,
    ) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == E4M3:
            return self._linear_float8(x)
        return linear(x, self.weight, self.bias, activation=self.activation, fixed=self.fixed)

    def _linear_float8(
        self, x: Tensor, *, residual: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        assert self.float8 is not None
        own = self.float8
        return linear_fp8(
            x,
            own.weight,
            own.scale,
            own.bias,
            activation=self.activation,
            residual=residual,
            out_scale=own.out_scale,
            out=out,
        )

    def compile_kernels(self) -> None:
        """Compile what this product may run, so that no forward waits for a compiler."""
        compile_product(self.weight, self.bias, activation=self.activation, fixed=self.fixed)
        if self.float8 is not None:
            compile_fp8(self.float8.weight, activation=self.activation)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Weight and bias, by their names in a checkpoint."""
        yield "weight", self.weight
        if self.bias is not None:
            yield "bias", self.bias

    def weight_targets(self, prefix: str) -> Iterator[WeightTarget]:
        yield from (whole(prefix + name, target) for name, target in self.tensors())


class ColumnParallelLinear(Linear):
    """The output features split over the ranks, after zero-padding to `padded` where given."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        activation: Activation = None,
        padded: int | None = None,
        parallel: ParallelContext = SINGLE,
    ) -> None:
        padded = padded or out_features
        super().__init__(in_features, padded // parallel.tp_size, activation=activation)
        self.out_features = out_features
        self.part = shard(padded, parallel)

    def weight_targets(self, prefix: str) -> Iterator[WeightTarget]:
        rows = clipped(self.part, self.out_features)
        for name, target in self.tensors():
            shape = (self.out_features, *target.shape[1:])
            yield partly(prefix + name, target, shape, rows_into(target, rows))


def rows_into(target: Tensor, rows: slice) -> Callable[[TensorSlice], None]:
    """A function that fills `target` with these rows of a tensor, and its rest with zeros."""

    def store(source: TensorSlice) -> None:
        count = rows.stop - rows.start
        target[:count].copy_(source[rows])
        target[count:].zero_()

    return store


class RowParallelLinear(Linear):
    """The input features split over the ranks; their products are summed, then the bias added."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        padded: int | None = None,
        adds_residual: bool = False,
        parallel: ParallelContext = SINGLE,
    ) -> None:
        """`adds_residual`: this layer is called through `add_norm_`, not on its own."""
        padded = padded or in_features
        super().__init__(padded // parallel.tp_size, out_features)
        self.adds_residual = adds_residual
        self.in_features = in_features
        self.part = shard(padded, parallel)
        self.parallel = parallel

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x [T, K / tp] -> [T, N], in `out` where it is given."""
        assert self.bias is not None
        if self.parallel.tp_size == 1:
            return linear(x, self.weight, self.bias, out=out, fixed=self.fixed)
        return torch.add(self._sum(x, "alone"), self.bias, out=out)

    def _sum(self, x: Tensor, use: str, out: Tensor | None = None) -> Tensor:
        """[T, N] without the bias, over all ranks; valid until the next product for `use`.

        It may take `out`, which is not `x`.
        """
        partial = self.parallel.partial_out(use, x.shape[0], self.weight.shape[0], x.dtype)
        product = linear(x, self.weight, None, out=out if partial is None else partial)
        return self.parallel.all_reduce(product)

    def start(self, x: Tensor, out: Tensor) -> dist.Work:
        """Start the sum over ranks, without the bias, into `out` [T, N]; wait before reading it."""
        linear(x, self.weight, None, out=out)
        return self.parallel.start_all_reduce(out)

    def add_norm_(
        self, residual: Tensor, x: Tensor, norm: Norm, spare: Tensor | None = None
    ) -> Tensor:
        """Add this layer's output to `residual` [T, N] in place; returns its norm [T, N].

        The residual rides in the product's epilogue where that is measured faster, else in the
        norm's one pass, which for few rows adds up the product's shares. The norm takes `spare`
        [T, N] where given, which may be `x`.
        """
        if self.float8 is not None and len(x) >= FEWEST_ROWS:
            if x.dtype != E4M3:
                x = to_e4m3(x, self.float8.in_scale)
            self._linear_float8(x, residual=residual, out=residual)
            return norm(residual, spare)
        if self.parallel.tp_size == 1:
            if fuses_residual(x, self.weight, fixed=self.fixed):
                linear(x, self.weight, self.bias, residual=residual, out=residual, fixed=self.fixed)
                return norm(residual, spare)
            shares = residual_shares(x, self.weight, fixed=self.fixed)
            if shares is not None:
                return norm.add_(residual, shares, self.bias, spare)
        read = spare is not None and spare.data_ptr() == x.data_ptr()
        # The norm may overwrite the sum: what runs before the next one, a merger, sums elsewhere.
        total = self._sum(x, "block", None if read else spare)
        return norm.add_(residual, total, self.bias, spare)

    def compile_kernels(self) -> None:
        if self.parallel.tp_size == 1:
            compile_product(self.weight, self.bias, residual=self.adds_residual, fixed=self.fixed)
        if self.float8 is not None:
            compile_fp8(self.float8.weight, residual=self.adds_residual)

    def weight_targets(self, prefix: str) -> Iterator[WeightTarget]:
        columns = clipped(self.part, self.in_features)
        count = columns.stop - columns.start
        weight = self.weight

        def store(source: TensorSlice) -> None:
            weight[:, :count].copy_(source[:, columns])
            weight[:, count:].zero_()

        yield partly(f"{prefix}weight", weight, (weight.shape[0], self.in_features), store)
        assert self.bias is not None
        yield whole(f"{prefix}bias", self.bias)
