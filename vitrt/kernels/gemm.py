"""Matrix products with bias, activation and residual: `linear`, and what it chooses by.

`quack` puts everything into the epilogue (Hopper), cuBLAS what it can; which is faster depends on
N, K and M and was measured (gemm_table.py). Where nothing was measured, cuBLAS runs and the kernels
of activation.py do the rest. What adds to the residual may instead be left in shares of K, for few
rows (split_product.py).

Shapes: M rows (patches or merged tokens), K input and N output features; swiglu halves N.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrt.kernels import gemm_aten, gemm_quack, gemm_triton
from vitrt.kernels.dispatch import HAVE_TRITON
from vitrt.kernels.gemm_table import Choice, Kind, Product, SplitTile, Table, Tile, table_for
from vitrt.kernels.split_product import split_product

Activation: TypeAlias = Literal["gelu_tanh", "gelu", "quick_gelu", "swiglu"] | None

# How cuBLAS carries each kind, where no table says otherwise.
_CUBLAS: dict[Kind, Choice] = {
    "bias": Choice("addmm"),
    "gelu_tanh": Choice("addmm"),
    "gelu": Choice("mm"),
    "quick_gelu": Choice("mm"),
    "swiglu": Choice("mm"),
    "residual": Choice("mm"),
}

_MOST_CHOSEN = 8192
_chosen: dict[tuple[Any, ...], Any] = {}  # a product seen before -> what runs it


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    fixed: bool = False,
) -> Tensor:
    """act(x W^T + b), or residual + (x W^T + b).

    Args:
        x: [M, K], rows contiguous.
        weight: [N, K]; for swiglu its rows are interleaved, gate 0, up 0, gate 1, up 1, ...
        bias: [N], in the order of the weight's rows.
        activation: None, "gelu_tanh", "gelu" (erf), "quick_gelu" (x * sigmoid(1.702 x)) or
            "swiglu"; not together with `residual`.
        residual: [M, N], float32 or of x's dtype, left as it is unless it is `out`.
        out: where the result goes, [M, N] ([M, N / 2] for swiglu), rows contiguous.
        fixed: on a GPU, one kernel and one tile whatever M is, so that no row of the result
            depends on how many there are.

    Returns [M, N] ([M, N / 2] for swiglu) in the dtype of x, or of the residual; rounded once where
    an epilogue carries everything.
    """
    assert activation is None or residual is None
    kind: Kind = activation or ("bias" if residual is None else "residual")
    # Each of them alone can rule a kernel out.
    key = (
        kind,
        x.shape,
        weight.shape,
        x.dtype,
        weight.dtype,
        None if bias is None else bias.dtype,
        None if residual is None else residual.dtype,
        x.device,
        fixed,
    )
    function = _chosen.get(key)
    if function is None:
        function = _choose_function(kind, x, weight, bias, residual, fixed)
        if len(_chosen) >= _MOST_CHOSEN:
            _chosen.clear()
        _chosen[key] = function
    return function(x, weight, bias, residual, out)


def fuses_residual(x: Tensor, weight: Tensor, *, fixed: bool = False) -> bool:
    """Whether `linear(..., residual=...)` beats the bare product and a fused add and norm.

    `fixed` ones always carry the residual.
    """
    if fixed:
        return True
    if not x.is_cuda:
        return x.device.type == "cpu"
    key = ("fuses", x.shape, weight.shape, x.dtype, x.device)
    answer = _chosen.get(key)
    if answer is None:
        n, k = weight.shape
        chosen = choose("residual", x.shape[0], n, k, x.dtype, x.device)
        answer = _chosen[key] = chosen.implementation == "quack"
    return answer


def residual_shares(x: Tensor, weight: Tensor, *, fixed: bool = False) -> Tensor | None:
    """float32 [S, M, N], which the norm after a residual adds up; None where that does not pay.

    x [M, K], rows contiguous. Its sum over S is x W^T. Never for `fixed` ones: the number of shares
    goes by M.
    """
    if fixed or not x.is_cuda:
        return None
    key = ("shares", x.shape, weight.shape, x.dtype, x.device)
    if key not in _chosen:
        _chosen[key] = _split_tile(x.shape[0], weight)
    tile = _chosen[key]
    return None if tile is None else split_product(x, weight, tile)


def _split_tile(m: int, weight: Tensor) -> SplitTile | None:
    table = _table_of(weight) if m else None
    if table is None:
        return None
    chosen = table.choice(Product("residual", *weight.shape), m)
    return None if chosen is None else chosen.split_tile


def _table_of(weight: Tensor) -> Table | None:
    """The table of a GPU's own measurements, for products in 16 bits."""
    if not weight.is_cuda or torch.version.hip or not HAVE_TRITON or weight.dtype.itemsize != 2:
        return None
    device = weight.device
    return table_for(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))


def choose(kind: Kind, m: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> Choice:
    """What runs a product with bias on `device`: the measured choice, where it can run."""
    table = _usable_table(kind, n, k, dtype, device)
    if table is None:
        # cuBLASLt's GELU is of 16-bit accuracy: float32 takes the exact kernels.
        return _CUBLAS[kind] if dtype.itemsize == 2 or kind == "bias" else Choice("mm")
    return table.choice(Product(kind, n, k), m) or _CUBLAS[kind]


def fixed_tile(kind: Kind, weight: Tensor, bias: Tensor | None) -> Tile | None:
    """The tile of quack that runs a `fixed` product; None: gemm_triton.py's own."""
    n, k = weight.shape
    table = None if bias is None else _usable_table(kind, n, k, weight.dtype, weight.device)
    return None if table is None else table.one_tile(Product(kind, n, k))


def compile_product(
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: Activation = None,
    residual: bool = False,
    fixed: bool = False,
) -> int:
    """Compiles what `linear` may run with this weight at any M; returns how many kernels.

    Called when a model is loaded, so that no call later waits: about two seconds for a kernel that
    is not yet in quack's disk cache, milliseconds for one that is. Layers of one shape share them.
    """
    kind: Kind = activation or ("residual" if residual else "bias")
    n, k = weight.shape
    if kind == "residual" and not fixed and (measured := _table_of(weight)) is not None:
        with torch.cuda.device(weight.device):  # Triton launches on the current one
            for split in measured.split_tiles(Product(kind, n, k)):
                split_product(weight.new_empty(1, k), weight, split)  # this compiles it
    table = None if bias is None else _usable_table(kind, n, k, weight.dtype, weight.device)
    if table is None:
        return 0
    tiles = table.tiles(Product(kind, n, k))
    if fixed:
        tiles = [tile for tile in (fixed_tile(kind, weight, bias),) if tile is not None]
    for tile in tiles:
        gemm_quack.compiled(kind, tile, weight.dtype, weight.device)
    return len(tiles)


def _usable_table(
    kind: Kind, n: int, k: int, dtype: torch.dtype, device: torch.device
) -> Table | None:
    if gemm_quack.unavailable(device) or not gemm_quack.supports(kind, n, k, dtype):
        return None
    return table_for(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))


def _choose_function(
    kind: Kind,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    fixed: bool = False,
) -> Any:
    """The function (x, weight, bias, residual, out) that runs this product from now on."""
    given = {t.dtype for t in (x, weight, bias) if t is not None}
    assert len(given) == 1, f"x, weight and bias must share a dtype, got {given}"
    assert residual is None or residual.dtype in (x.dtype, torch.float32), residual.dtype
    assert x.ndim == 2 and weight.ndim == 2 and x.shape[1] == weight.shape[1], (
        f"x {tuple(x.shape)} and weight {tuple(weight.shape)} do not share K"
    )
    if x.device.type == "cpu":
        return partial(gemm_aten.on_cpu, kind)
    m, (n, k) = x.shape[0], weight.shape
    if fixed:
        tile = fixed_tile(kind, weight, bias)
        if tile is not None and gemm_quack.takes_residual(residual):
            return gemm_quack.compiled(kind, tile, x.dtype, x.device)
        return partial(gemm_triton.product, kind)
    if bias is None or not x.is_cuda or m == 0:
        return partial(gemm_aten.product_then_kernel, kind)
    chosen = choose(kind, m, n, k, x.dtype, x.device)
    if chosen.tile is not None and gemm_quack.takes_residual(residual):
        return gemm_quack.compiled(kind, chosen.tile, x.dtype, x.device)
    if chosen.implementation == "addmm":
        return partial(gemm_aten.addmm, kind)
    return partial(gemm_aten.product_then_kernel, kind)


def linear_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`linear` with float32 (float64 for float64 inputs) inside and one rounding: the oracle."""
    inside = torch.promote_types(x.dtype, torch.float32)
    result = F.linear(x.to(inside), weight.to(inside), None if bias is None else bias.to(inside))
    if activation == "swiglu":
        gate, up = result.unflatten(-1, (-1, 2)).unbind(-1)
        result = F.silu(gate) * up
    elif activation == "quick_gelu":
        result = result * torch.sigmoid(1.702 * result)
    elif activation is not None:
        result = F.gelu(result, approximate="tanh" if activation == "gelu_tanh" else "none")
    if residual is None:
        return result.to(x.dtype)
    return (result + residual.to(inside)).to(residual.dtype)
