"""Matrix products of operands in float8 (e4m3), with scales, bias and the rest in the epilogue.

e4m3 is a floating-point format: a scale only has to keep values inside its range, +-448, and 14
binades of full precision lie below. So activations need no maximum that is found while they are
computed: one scale a layer, from a bound that the weights alone give (layers/float8.py), never
overflows and costs no pass. Weights have one scale an output channel.

On Hopper with quack everything is one kernel. Elsewhere PyTorch's scaled product runs, and our
kernels do the rest; without a GPU, the reference.

Shapes: M rows, K input and N output features; swiglu halves N.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrt.kernels import gemm_quack
from vitrt.kernels.gemm import Activation
from vitrt.kernels.gemm_table import Kind, Product, Table, Tile, table_for
from vitrt.kernels.to_e4m3 import LARGEST

E4M3 = torch.float8_e4m3fn

_DEFAULT_TILE = Tile(128, 192, True, 1, 2)
_MOST_PRODUCTS = 8192
# What runs a product seen before: to choose again costs the host as much as a launch.
_products: dict[tuple[Kind, int, torch.Size, torch.device], gemm_quack.FusedProduct | None] = {}


def unavailable(device: torch.device) -> str | None:
    """None where such products run on `device`, else the reason why not."""
    if device.type == "cpu":
        return None  # the reference
    if device.type != "cuda" or torch.version.hip is not None:
        return f"needs an NVIDIA GPU, this device is {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        major, minor = capability
        return f"needs compute capability 8.9 or newer, this device has {major}.{minor}"
    return None


def quantise_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(e4m3 [N, K], float32 [N]): weight = the first times the second, row by row."""
    largest = weight.float().abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    scale = largest / LARGEST
    return (weight.float() / scale[:, None]).to(E4M3), scale


def linear_fp8(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    activation: Activation = None,
    residual: Tensor | None = None,
    out_scale: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """act(scale * (x W^T) + b), or that added to a residual.

    Args:
        x: e4m3 [M, K], rows contiguous.
        weight: e4m3 [N, K]; for swiglu its rows are interleaved as in `gemm.linear`.
        scale, bias: float32 [N]; the scale takes back that of the weight's row and that of x.
        activation: None, "gelu_tanh", "quick_gelu" or "swiglu"; not together with `residual`.
        residual: float32 [M, N], left as it is unless it is `out`.
        out_scale: float32 [N], only with a GELU: the result times this, in e4m3.
        out: where the result goes, rows contiguous.

    Returns bfloat16 [M, N] ([M, N / 2] for swiglu), e4m3 with `out_scale`, float32 with a residual.
    """
    kind: Kind = activation or ("bias" if residual is None else "residual")
    assert (out_scale is not None) == (kind in gemm_quack.TO_E4M3), kind
    if not x.is_cuda:
        result = linear_fp8_ref(
            x, weight, scale, bias, activation=activation, residual=residual, out_scale=out_scale
        )
        return result if out is None else out.copy_(result)
    product = _product(kind, x, weight)
    if product is None:
        return _scaled_mm(kind, x, weight, scale, bias, residual, out_scale, out)
    if out_scale is None:
        return product(x, weight, bias, residual, out, scale=scale)
    return product(x, weight, bias, residual, out, scale=scale, out_scale=out_scale)


def _product(kind: Kind, x: Tensor, weight: Tensor) -> gemm_quack.FusedProduct | None:
    """quack's kernel for this product, looked up once; None where quack does not run."""
    key = (kind, x.shape[0], weight.shape, x.device)
    if key not in _products:
        if len(_products) >= _MOST_PRODUCTS:
            _products.clear()
        _products[key] = None
        if gemm_quack.unavailable(x.device) is None:
            tile = tile_for(kind, x, weight)
            _products[key] = gemm_quack.compiled(kind, tile, E4M3, x.device)
    return _products[key]


def tile_for(kind: Kind, x: Tensor, weight: Tensor) -> Tile:
    """The measured tile of the nearest product, else one that does well for many rows."""
    table, product = _measured(kind, weight)
    choice = None if table is None else table.choice(product, x.shape[0])
    return _DEFAULT_TILE if choice is None or choice.tile is None else choice.tile


def compile_product(
    weight: Tensor, *, activation: Activation = None, residual: bool = False
) -> None:
    """Compile what `linear_fp8` may run with this weight at any M."""
    kind: Kind = activation or ("residual" if residual else "bias")
    if weight.is_cuda and gemm_quack.unavailable(weight.device) is None:
        table, product = _measured(kind, weight)
        for tile in (table.tiles(product) if table else []) or [_DEFAULT_TILE]:
            gemm_quack.compiled(kind, tile, E4M3, weight.device)


def _measured(kind: Kind, weight: Tensor) -> tuple[Table | None, Product]:
    """The table of the weight's device, and the product as tables name it."""
    device, (n, k) = weight.device, weight.shape
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    return table_for(name, capability), Product(kind, n, k, "e4m3")


def _scaled_mm(
    kind: Kind,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    out_scale: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    """PyTorch's product in bfloat16, then elementwise passes."""
    ones = torch.ones(x.shape[0], 1, dtype=torch.float32, device=x.device)
    product = torch._scaled_mm(
        x, weight.t(), ones, scale[None], out_dtype=torch.bfloat16, use_fast_accum=True
    )
    result = _finish(kind, product.float() + bias, residual, out_scale)
    return result if out is None else out.copy_(result)


def _finish(
    kind: Kind, product: Tensor, residual: Tensor | None, out_scale: Tensor | None
) -> Tensor:
    """float32 [M, N], bias included -> what `linear_fp8` returns."""
    if residual is not None:
        return residual + product
    if kind == "swiglu":
        gate, up = product.unflatten(-1, (-1, 2)).unbind(-1)
        return (F.silu(gate) * up).to(torch.bfloat16)
    if out_scale is not None:
        if kind == "quick_gelu":
            activated = product * torch.sigmoid(1.702 * product) * out_scale
        else:
            activated = F.gelu(product, approximate="tanh") * out_scale
        return activated.clamp(-LARGEST, LARGEST).to(E4M3)
    return product.to(torch.bfloat16)


def linear_fp8_ref(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    activation: Activation = None,
    residual: Tensor | None = None,
    out_scale: Tensor | None = None,
) -> Tensor:
    """`linear_fp8` with float32 inside and one rounding: the oracle, and the CPU path."""
    kind: Kind = activation or ("bias" if residual is None else "residual")
    product = F.linear(x.float(), weight.float()) * scale + bias
    return _finish(kind, product, residual, out_scale)
