"""Matrix products with everything in the epilogue, by quack-kernels (CuTe DSL) on Hopper.

A kernel is compiled for a kind, a tile and a dtype, never for a shape: about two seconds once, then
quack keeps it on disk (disk_cache.py says where), and so do we in a form that loads without quack
(kept.py).
`FusedProduct` holds the finished launch plan, so that a call costs the host about what cuBLAS does;
nothing in it synchronises, so a graph can capture it.

Shapes: M rows, K input and N output features.
"""

from __future__ import annotations

import importlib.util
import logging
import threading
import time
from collections.abc import Callable
from functools import lru_cache, partial
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from vitrt.kernels import gemm_kept
from vitrt.kernels.disk_cache import keep_kernels
from vitrt.kernels.gemm_table import Kind, Tile

logger = logging.getLogger(__name__)

RELEASES = "0.6."  # of quack-kernels: its launch plans are no stable interface

_PACKAGES = ("quack", "cutlass", "tvm_ffi")
_DTYPES = (torch.bfloat16, torch.float16)
_E4M3 = torch.float8_e4m3fn
_COMPILED = 0.5  # seconds, from which on a kernel was compiled and not loaded
_ALIGNMENT = 8  # elements: a row starts on 16 bytes, which TMA asks for

# Between two products of an MLP: what comes out is the e4m3 operand of the next.
TO_E4M3: tuple[Kind, ...] = ("gelu_tanh", "quick_gelu")

_compile_lock = threading.Lock()
_compiled: dict[tuple[Kind, Tile, torch.dtype, torch.device], FusedProduct] = {}


def unavailable(device: torch.device) -> str | None:
    """None where quack's products run on `device`, else the reason why not."""
    if device.type != "cuda":
        return f"needs a CUDA device, this one is {device.type}"
    if torch.version.hip is not None:
        return "needs an NVIDIA GPU"
    return _unavailable(torch.cuda.get_device_capability(device))


@lru_cache(maxsize=8)
def _unavailable(capability: tuple[int, int]) -> str | None:
    if capability[0] != 9:
        major, minor = capability
        return f"tuned for compute capability 9.x (Hopper), this device has {major}.{minor}"
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed: pip install 'vitrt[hopper]'"
    try:
        version = metadata.version("quack-kernels")
    except metadata.PackageNotFoundError:
        version = "of unknown version"
    if not version.startswith(RELEASES):
        needed = f"quack-kernels {version} is installed, {RELEASES}x is needed"
        return f"{needed}: pip install 'vitrt[hopper]'"
    keep_kernels()
    if gemm_kept.any_kept():  # by a process that could import all of it
        return None
    try:
        import vitrt.kernels.gemm_epilogues  # noqa: F401
    except Exception as error:  # whatever a mismatched CUTLASS raises: cuBLAS still works
        return f"import failed: {type(error).__name__}: {error}"
    return None


def supports(kind: Kind, n: int, k: int, dtype: torch.dtype) -> bool:
    """Whether rows of both matrices and of the output are aligned as TMA asks."""
    aligned = 2 * _ALIGNMENT if kind == "swiglu" else _ALIGNMENT
    return dtype in _DTYPES and n % aligned == 0 and k % _ALIGNMENT == 0


def takes_residual(residual: Tensor | None) -> bool:
    """Whether the compiled kernels add it: they are compiled for hidden states in float32."""
    return residual is None or residual.dtype == torch.float32


class FusedProduct:
    """One compiled kernel: a product of any shape with its epilogue, rounded once."""

    __slots__ = ("_gated", "_launch", "_out_dtype")

    def __init__(self, kind: Kind, dtype: torch.dtype, launch: Callable[..., Any]) -> None:
        """`launch` takes x, weight, the product or None, the residual or None, and the rest."""
        self._gated = kind == "swiglu"
        self._out_dtype = _result_dtype(kind, dtype)
        self._launch = launch

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None = None,
        out: Tensor | None = None,
        **vectors: Tensor,
    ) -> Tensor:
        """act(x [M, K] weight [N, K]^T + bias [N]), or that added to a float32 residual [M, N].

        `vectors` are what the epilogue of e4m3 operands takes beside the bias.
        """
        if out is None and residual is not None:
            out = torch.empty_like(residual)
        elif out is None:
            n = weight.shape[0]
            shape = x.shape[0], n // 2 if self._gated else n
            out = torch.empty(shape, dtype=self._out_dtype, device=x.device)
        # A gated result is half as wide as the product: to quack a second output, not its D matrix.
        product = None if self._gated else out
        arguments = {"bias": bias, "out": out, **vectors}
        self._launch(x, weight, product, residual, arguments)
        return out


def compiled(kind: Kind, tile: Tile, dtype: torch.dtype, device: torch.device) -> FusedProduct:
    """The kernel, on first use loaded from disk, or else compiled, and run once.

    Run once because CUDA loads a kernel at its first launch, and under graph capture it must not.
    """
    key = (kind, tile, dtype, device)
    with _compile_lock:
        if key not in _compiled:
            started = time.perf_counter()
            with torch.cuda.device(device):
                _compiled[key] = _kept(kind, tile, dtype, device) or _made(*key)
            seconds = time.perf_counter() - started
            # Loaded from disk it takes milliseconds, which nobody waits for.
            level = logging.INFO if seconds > _COMPILED else logging.DEBUG
            logger.log(level, "product %s %s %s ready in %.1f s", kind, tile, dtype, seconds)
        return _compiled[key]


def _made(kind: Kind, tile: Tile, dtype: torch.dtype, device: torch.device) -> FusedProduct:
    """The kernel by quack, which finds it in its own folder or compiles it."""
    plan = compile_and_launch(kind, tile, dtype, device)
    from quack.gemm_runtime.host import run_gemm_epi_plan

    gemm_kept.keep(kind, tile, dtype, plan)
    return FusedProduct(kind, dtype, partial(run_gemm_epi_plan, plan))


def _kept(kind: Kind, tile: Tile, dtype: torch.dtype, device: torch.device) -> FusedProduct | None:
    """The kernel that an earlier process kept, without quack, if it passes its test; else None."""
    launch = gemm_kept.load(kind, tile, dtype, device)
    if launch is None:
        return None
    product = FusedProduct(kind, dtype, launch)
    return product if gemm_kept.is_right(product, kind, tile, dtype, device) else None


def _result_dtype(kind: Kind, dtype: torch.dtype) -> torch.dtype:
    """Hidden states stay float32; of e4m3 operands only a GELU's result is one itself."""
    if kind == "residual":
        return torch.float32
    if dtype == _E4M3 and kind not in TO_E4M3:
        return torch.bfloat16
    return dtype


def compile_and_launch(kind: Kind, tile: Tile, dtype: torch.dtype, device: torch.device) -> Any:
    """quack's launch plan, which holds for every shape, made by running one small product."""
    from vitrt.kernels import gemm_epilogues

    m, n, k = 256, 512, 128
    x = torch.zeros(m, k, dtype=torch.float32, device=device).to(dtype)
    weight = torch.zeros(n, k, dtype=torch.float32, device=device).to(dtype)
    gated, scaled = kind == "swiglu", dtype == _E4M3
    product = torch.empty(m, n, dtype=_result_dtype(kind, dtype), device=device)
    vector = torch.zeros(n, dtype=torch.float32 if scaled else dtype, device=device)
    arguments = {"bias": vector}
    if gated:
        arguments["out"] = torch.empty(m, n // 2, dtype=product.dtype, device=device)
    if scaled:
        arguments["scale"] = vector
        if kind in TO_E4M3:
            arguments["out_scale"] = vector
    epilogues = gemm_epilogues.SCALED_EPILOGUES if scaled else gemm_epilogues.EPILOGUES
    return epilogues[kind].gemm(
        x,
        weight,
        None if gated else product,
        torch.zeros_like(product) if kind == "residual" else None,
        epi_args=arguments,
        tile_M=tile.m,
        tile_N=tile.n,
        pingpong=tile.pingpong,
        cluster_M=tile.cluster_m,
        cluster_N=tile.cluster_n,
        split_k=tile.split_k,
        # Hopper adds up e4m3 products in fewer bits, which its bound on the error allows for:
        # adding up in float32 outside the tensor cores takes half of what e4m3 gains.
        post_init_attrs=(("fp8_slow_accum", False),) if scaled else (),
    )
