"""Where kernels run, and that nothing needs Triton to be imported."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from vitrt.kernels import dispatch

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # import triton raises ImportError
import torch
from vitrt.kernels import activation, dispatch, norm, patchify, pos_embed, rope
assert not dispatch.HAVE_TRITON and not dispatch.use_triton(torch.ones(1))
x = torch.randn(3, 8)
expected = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
torch.testing.assert_close(norm.norm(x, torch.ones(8), None, 1e-6), expected)
assert activation.swiglu(x).shape == (3, 4)
"""


def test_the_cpu_path_needs_no_triton() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_cpu_tensors_stay_in_pytorch() -> None:
    assert not dispatch.use_triton(torch.ones(1))


@pytest.mark.gpu
def test_cuda_tensors_go_to_triton() -> None:
    assert dispatch.use_triton(torch.ones(1, device="cuda"))


@pytest.mark.parametrize("width", [1, 2, 3, 8, 77, 1000, 1024, 1152, 1280, 4608, 5120, 20000])
def test_row_tiles_cover_the_row(width: int) -> None:
    main, tail, warps = dispatch.row_tiles(width)
    assert main <= width <= main + tail
    for size in (main, warps, tail or 1):
        assert size & (size - 1) == 0
    assert tail <= main and warps <= 16
