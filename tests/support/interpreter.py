"""Triton's interpreter on the CPU: the mark for tests that need it, and a repair for NumPy 2.4.

Triton 3.6 reads a loop's bounds by int() of a one-element array, which NumPy 2.4
refuses.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from vitrt.kernels.dispatch import HAVE_TRITON

interpreted = pytest.mark.skipif(
    not HAVE_TRITON or torch.cuda.is_available(), reason="needs Triton's interpreter"
)


def _repair_loop_bounds() -> None:
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_repair(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_repair


if HAVE_TRITON:
    _repair_loop_bounds()


@pytest.fixture
def rows_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products add up every row of a tile in one order, as a GPU does.

    The interpreter's go through BLAS, which on some CPUs adds up a row by its place in the tile.
    """
    from triton.runtime import interpreter

    def create_dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        product = np.einsum("mk,kn->mn", a.data, b.data, dtype=d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
