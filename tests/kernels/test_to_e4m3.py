"""The cast to e4m3: the interpreter in float32 here, bfloat16 on a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.support.interpreter import interpreted
from vitrt.kernels.to_e4m3 import LARGEST, _cast_triton, to_e4m3, to_e4m3_ref


def test_the_reference_rounds_once_and_saturates() -> None:
    x = torch.tensor([[0.0, 1.0, -1.0625, 447.0, 1e4, -1e4, 2.0**-9]])
    assert to_e4m3(x, 1.0).float().tolist() == [[0.0, 1.0, -1.0, 448.0, 448.0, -448.0, 2.0**-9]]
    assert to_e4m3(x, 0.5).float()[0, 4] == LARGEST


@interpreted
@pytest.mark.parametrize("shape", [(1, 1), (3, 40), (5, 1152), (7, 3456)])
def test_the_kernel_covers_every_element(shape: tuple[int, int]) -> None:
    """Powers of two, since the interpreter does not round to e4m3 as a GPU does."""
    x = torch.randint(-6, 8, shape).float().exp2() * torch.randint(0, 2, shape).sub(0.5).sign()
    assert torch.equal(_cast_triton(x, 2.0).float(), to_e4m3_ref(x, 2.0).float())


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 8), (4097, 1152), (1296, 3456)])
def test_the_kernel_on_gpu(shape: tuple[int, int]) -> None:
    x = torch.randn(shape, device="cuda").bfloat16() * 300
    assert torch.equal(to_e4m3(x, 0.9).view(torch.uint8), to_e4m3_ref(x, 0.9).view(torch.uint8))
