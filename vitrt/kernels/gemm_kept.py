"""quack's products launched without quack: what a launch needs of its plan, and a first test.

Shapes: M rows, K input and N output features.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from vitrt.kernels import kept
from vitrt.kernels.gemm_table import Kind, Tile
from vitrt.kernels.persistent import processors

_FAMILY = "product"
_E4M3 = torch.float8_e4m3fn
_SPLIT = ("split_k_semaphore", "split_k_workspace")

# Relative errors: bf16 rounds by 0.2%, e4m3 by 3%, and what was not computed is off by 100%.
_TOLERANCE, _TOLERANCE_E4M3 = 0.01, 0.08


def _key(kind: Kind, tile: Tile, dtype: torch.dtype) -> str:
    return f"sm_90a {kind} {tile} {dtype}"


def any_kept() -> bool:
    return kept.any_of(_FAMILY)


def keep(kind: Kind, tile: Tile, dtype: torch.dtype, plan: Any) -> None:
    """Keep the kernel of quack's plan, if `_Launch` gives it all that it takes."""
    kept.keep(_FAMILY, _key(kind, tile, dtype), lambda: _found(tile, plan))


def _found(tile: Tile, plan: Any) -> tuple[Path, kept.Description] | None:
    from quack.gemm_config import SplitKMode

    plain = (
        all(convert is None for _, convert, _ in plan.call_ops)
        and plan.scheduler_static is not None
        and (plan.split_k == 1 or plan.split_k_mode == SplitKMode.SERIAL)
        and plan.cu_tiles_tile_m is None
        and not plan.d_transposed
        # A cluster of two blocks always fits; how many larger ones do, only the driver knows.
        and tile.cluster_m * tile.cluster_n <= 2
    )
    object_file = _object_file(plan.compiled_fn)
    if not plain or object_file is None:
        return None
    return object_file, {
        "fields": list(plan.arg_template),
        "persistent": plan.max_active_clusters > 0,
        "swizzle": plan.max_swizzle_size,
    }


def _object_file(compiled: Any) -> Path | None:
    """The file that quack keeps a kernel in; None where it keeps none."""
    from quack.cache import jit
    from quack.gemm_runtime import host

    compile_one = host._compile_gemm_epi
    for key, function in compile_one.cache.items():
        if function is compiled:
            name = jit._key_to_hash((compile_one.__qualname__, *key))
            return Path(jit.get_cache_path(), jit._compute_source_fingerprint(), f"{name}.o")
    return None


def load(
    kind: Kind, tile: Tile, dtype: torch.dtype, device: torch.device
) -> Callable[..., None] | None:
    found = kept.load(_FAMILY, _key(kind, tile, dtype))
    if found is None:
        return None
    function, description = found
    return _Launch(function, description, tile, device)


class _Launch:
    """A kernel and the arguments that no call changes."""

    __slots__ = ("_fields", "_function", "_scheduler", "_tile")

    def __init__(
        self, function: kept.Function, description: kept.Description, tile: Tile,
        device: torch.device,
    ) -> None:  # fmt: skip
        self._function = function
        self._fields = tuple(description["fields"])
        self._tile = tile
        clusters = processors(device) // (tile.cluster_m * tile.cluster_n)
        running = clusters if description["persistent"] else 0
        # Clusters at once, order (compiled in), swizzle; no semaphore, permutation or gathering.
        self._scheduler = (running, None, description["swizzle"], None, None, None)

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        product: Tensor | None,
        residual: Tensor | None,
        arguments: dict[str, Tensor],
    ) -> None:
        if self._tile.split_k > 1:
            assert product is not None
            arguments.update(zip(_SPLIT, _split_buffers(product, self._tile), strict=True))
        epilogue = tuple(map(arguments.get, self._fields))
        self._function(
            x, weight, product, residual, epilogue, self._scheduler, None, None, None
        )  # no variable lengths, no scales of blocks


def _split_buffers(product: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    """Turnstiles int32 [tiles of M, tiles of N, 1] and partial sums [tile, .., .., 1].

    For whole clusters: blocks that lie outside the product take part, too.
    """
    m, n = product.shape
    rows = -(-m // (tile.m * tile.cluster_m)) * tile.cluster_m
    columns = -(-n // (tile.n * tile.cluster_n)) * tile.cluster_n
    turns = torch.zeros(1, rows, columns, dtype=torch.int32, device=product.device)
    sums = torch.empty(
        1, rows, columns, tile.m * tile.n, dtype=torch.float32, device=product.device
    )
    return turns.permute(1, 2, 0), sums.permute(3, 1, 2, 0)


@lru_cache(maxsize=1)
def _operands() -> dict[str, Tensor]:
    """Numbers on the host: M = 192, N = 512, K = 128; biases and scales tell columns apart."""
    random = torch.Generator().manual_seed(0)
    m, n, k = 192, 512, 128

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    return {
        "x": normal(m, k),
        "weight": normal(n, k) / k**0.5,
        "bias": normal(n),
        "residual": normal(m, n),
        "scale": normal(n).abs() + 0.5,
        "out_scale": normal(n).abs() + 0.5,
    }


def is_right(
    product: Callable[..., Tensor], kind: Kind, tile: Tile, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether `product` gives on `device` what the host does, for one small product.

    This also makes CUDA load the kernel, which it must not do under graph capture.
    """

    def launch() -> bool:
        given = {name: tensor.to(_dtype_of(name, dtype)) for name, tensor in _operands().items()}
        names = ["x", "weight", "bias"]
        if kind == "residual":
            names.append("residual")
        if dtype == _E4M3:
            names += (
                ["scale"] if kind not in ("gelu_tanh", "quick_gelu") else ["scale", "out_scale"]
            )
        used = {name: given[name] for name in names}
        actual = product(**{name: tensor.to(device) for name, tensor in used.items()})
        wanted = _expected(kind, {name: tensor.float() for name, tensor in used.items()})
        error = (actual.cpu().float() - wanted).norm() / wanted.norm()
        return bool(error < (_TOLERANCE_E4M3 if actual.dtype == _E4M3 else _TOLERANCE))

    return kept.proven(_FAMILY, _key(kind, tile, dtype), launch)


def _dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
    if name == "residual" or (dtype == _E4M3 and name not in ("x", "weight")):
        return torch.float32
    return dtype


def _expected(kind: Kind, given: dict[str, Tensor]) -> Tensor:
    value = given["x"] @ given["weight"].T * given.get("scale", torch.ones(1)) + given["bias"]
    match kind:
        case "residual":
            value = value + given["residual"]
        case "gelu":
            value = gelu(value)
        case "gelu_tanh":
            value = gelu(value, approximate="tanh")
        case "quick_gelu":
            value = value * torch.sigmoid(1.702 * value)
        case "swiglu":
            value = silu(value[:, 0::2]) * value[:, 1::2]
    return value * given.get("out_scale", torch.ones(1))
