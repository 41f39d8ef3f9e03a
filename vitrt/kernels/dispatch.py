"""The one place that says where Triton kernels run; without Triton all still imports."""

from __future__ import annotations

from contextlib import suppress
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

triton: Any = None
tl: Any = None  # kernel files take `tl` from here
with suppress(ImportError):
    import triton  # type: ignore[no-redef]
    import triton.language as tl  # type: ignore[no-redef]

__all__ = [
    "HAVE_TRITON",
    "ceil_div",
    "dot_precision",
    "jit",
    "pow2_ceil",
    "pow2_floor",
    "row_tiles",
    "tl",
    "use_triton",
]

HAVE_TRITON = triton is not None


def jit(**options: Any) -> Any:
    """`triton.jit(**options)`, or a decorator that does nothing where Triton is not installed."""
    return triton.jit(**options) if HAVE_TRITON else lambda function: function


def use_triton(tensor: Tensor) -> bool:
    """Whether the Triton kernels take `tensor`: on CUDA (ROCm too) or XPU, with Triton."""
    return HAVE_TRITON and (tensor.is_cuda or tensor.is_xpu)


def dot_precision(operand: Tensor) -> str:
    """`input_precision` of tl.dot: no TF32 for float32; of no effect for 16 bits."""
    return "ieee" if operand.dtype == torch.float32 else "tf32"


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
    """(main, tail, warps): two power-of-two tiles that cover a row, and the warps that hold it.

    Tiles must be powers of two. One of 2048 would leave 44% of its values empty at width 1152,
    where 1024 + 256 leave 10%. A warp holds 1024 values of a row, 32 a lane: four 16-byte loads of
    bf16 in flight, and no barrier between warps in the reductions at the towers' widths. The tail
    has 8 values a lane at least: its loads are as wide, and Triton need not move it between lanes.
    """
    main = pow2_floor(width)
    warps = min(max(main // 1024, 1), 16)
    tail = max(pow2_ceil(width - main), min(256 * warps, main)) if width > main else 0
    return main, tail, warps


class NotCompiledError(Exception):
    """Another package's compiler refuses what we gave it; nothing was launched."""
