"""The one place that says where Triton kernels run; Triton itself stays optional (CPU-only and macOS installs)."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None  # type: ignore[assignment]

HAVE_TRITON = triton is not None


def jit(**options: Any) -> Any:
    """`triton.jit(**options)`, or a decorator that leaves the function alone where Triton is not installed."""
    return triton.jit(**options) if HAVE_TRITON else lambda function: function


def use_triton(tensor: Tensor) -> bool:
    """Whether work on `tensor` goes to the Triton kernels: CUDA (ROCm too) and XPU, with Triton installed."""
    return HAVE_TRITON and (tensor.is_cuda or tensor.is_xpu)


def ceil_div(value: int, by: int) -> int:
    return -(-value // by)


def pow2_floor(value: int) -> int:
    """The largest power of two that is not above `value`."""
    return 1 << (value.bit_length() - 1)


def pow2_ceil(value: int) -> int:
    """The smallest power of two that is not below `value`."""
    return 1 << (value - 1).bit_length()


@lru_cache(maxsize=256)
def row_tiles(width: int) -> tuple[int, int, int]:
    """(main, tail, warps): two power-of-two tiles that cover a row of `width`, and the warps that hold it.

    Tiles must be powers of two. One of 2048 would leave 44% of the lanes idle at width 1152; 1024 + 128 leaves
    none. A warp holds 1024 values of a row, 32 a lane: four 16-byte loads of bf16 in flight, and at the towers'
    widths the reduction needs no barrier between warps.
    """
    main = pow2_floor(width)
    tail = pow2_ceil(width - main) if width > main else 0
    return main, tail, min(max(main // 1024, 1), 16)
