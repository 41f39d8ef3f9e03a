"""What the kernel tests share: where each runs, and the bound that one rounding leaves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

EPS32 = torch.finfo(torch.float32).eps

_interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter serves hosts without a GPU"
)
# Triton kernels: bf16 dots are wrong in the interpreter, and float32 is all it needs to show.
TRITON_CASES = [
    pytest.param("cpu", torch.float32, id="interpreter-float32", marks=_interpreted),
    *(
        pytest.param("cuda", dtype, id=f"cuda-{str(dtype)[6:]}", marks=pytest.mark.gpu)
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    ),
]
REFERENCE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def assert_rounded(actual: Tensor, exact: Tensor, slack: Tensor) -> None:
    """`actual` is `exact` (float64) computed with an error under `slack`, then rounded once."""
    info = torch.finfo(actual.dtype)
    smallest = info.smallest_normal * info.eps
    bound = slack + 0.5 * info.eps * (exact.abs() + slack) + smallest
    error = (actual.double() - exact).abs()
    # Written so that NaN fails.
    wrong = ~(error <= bound)
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {wrong.numel()} values are off, by up to "
        f"{float((error / bound)[wrong].max()):.3g} of the bound"
    )


def random_like_weights(*shape: int, device: str, dtype: torch.dtype) -> Tensor:
    return (1.0 + 0.5 * torch.randn(*shape, device=device)).to(dtype)
