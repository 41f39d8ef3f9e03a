"""Matrix products through PyTorch: cuBLAS and what its epilogue can do, and the CPU.

Shapes: M rows, K input and N output features; swiglu pairs columns: N = 2F, g0, u0, g1, u1, ...
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrt.kernels.activation import bias_act, swiglu
from vitrt.kernels.gemm_table import Kind


def addmm(
    kind: Kind,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`bias` and `gelu_tanh` inside cuBLASLt's epilogue; `residual` added by a second kernel."""
    if residual is not None:
        return torch.add(residual, torch.addmm(bias, x, weight.t()), out=out)
    if kind == "gelu_tanh":  # cuBLASLt's GELU is the tanh formula
        if out is None:
            return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)
        return torch._addmm_activation(bias, x, weight.t(), use_gelu=True, out=out)
    assert kind == "bias", kind
    if out is None:
        return torch.addmm(bias, x, weight.t())
    return torch.addmm(bias, x, weight.t(), out=out)


def product_then_kernel(
    kind: Kind,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The bare product, then bias and activation in one pass (in place where the width stays)."""
    if kind == "swiglu":
        return swiglu(x @ weight.t(), bias, out=out)
    if residual is not None:
        product = x @ weight.t()
        product = product if bias is None else product.add_(bias)
        return torch.add(residual, product, out=out)
    if out is None:
        out = x @ weight.t()
    else:
        torch.mm(x, weight.t(), out=out)
    if kind in ("gelu", "gelu_tanh", "quick_gelu"):
        return bias_act(out, bias, kind, out=out)
    return out if bias is None else out.add_(bias)


def on_cpu(
    kind: Kind,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Plain PyTorch, in place on what the products allocate."""
    if kind == "swiglu":
        # Two products with every second row of the weight (BLAS takes the row stride as it is): one
        # product would leave gate and up interleaved, and silu of every second column is slow.
        gate_bias, up_bias = (None, None) if bias is None else (bias[0::2], bias[1::2])
        result = F.silu(F.linear(x, weight[0::2], gate_bias), inplace=True)
        result.mul_(F.linear(x, weight[1::2], up_bias))
    else:
        result = F.linear(x, weight, bias)
        if kind in ("gelu", "gelu_tanh"):
            torch.ops.aten.gelu_(result, approximate="tanh" if kind == "gelu_tanh" else "none")
        elif kind == "quick_gelu":
            result.mul_(torch.sigmoid(1.702 * result))
        if residual is not None:
            return torch.add(residual, result, out=out)
    return result if out is None else out.copy_(result)
