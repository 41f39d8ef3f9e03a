"""What the kernel tests share: where each runs, and the bound that one rounding leaves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.interpreter import interpreted

EPS32 = torch.finfo(torch.float32).eps

# The interpreter rounds to float16 as a GPU does, but truncates to bfloat16.
TRITON_CASES = [
    *(
        pytest.param("cpu", dtype, id=f"interpreter-{str(dtype)[6:]}", marks=interpreted)
        for dtype in (torch.float32, torch.float16)
    ),
    *(
        pytest.param("cuda", dtype, id=f"cuda-{str(dtype)[6:]}", marks=pytest.mark.gpu)
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    ),
]
REFERENCE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def triton_cases(shapes: Sequence[tuple[int, ...]]) -> list[Any]:
    """TRITON_CASES with all shapes for each device's main dtype, two for the rest.

    On a GPU each is a compilation.
    """
    main = (("cpu", torch.float32), ("cuda", torch.bfloat16))
    return [
        pytest.param(*case.values, shape, id=f"{case.id}-{shape}", marks=case.marks)
        for case in TRITON_CASES
        for shape in (shapes if case.values in main else shapes[:2])
    ]


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
