"""Keeping torch.compile out of what it could only make slower, or fail on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def outside_compiler(function: F) -> F:
    """Mark `function` so that a compiled caller breaks its graph there, and calls it as it is.

    Inside are tuned kernels, caches and locks, and shapes new at every grid. This is what
    `torch.compiler.disable` does; that however puts a call around every call, and imports the
    compiler, which takes longer than the rest of the package. So the two marks that the compiler
    looks for are set here where they are known: the one says not to trace into the function, the
    other not to compile its frame, nor what that calls.
    """
    try:
        from torch._C._dynamo import eval_frame

        skip = eval_frame._FrameAction.SKIP
        strategy = eval_frame._FrameExecStrategy(skip, skip)
        eval_frame.set_code_exec_strategy(function.__code__, strategy)
    except (ImportError, AttributeError, TypeError):  # another version of torch
        return torch.compiler.disable(function)
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    function._torchdynamo_disable_msg = "vitrt brings its own kernels and graphs"  # type: ignore[attr-defined]
    return function
