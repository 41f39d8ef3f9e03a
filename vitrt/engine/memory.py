"""Which memory ran out, the device's or the host's, and page-locked memory where there is some."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_HOST_SIGNS = ("DefaultCPUAllocator", "Cannot allocate memory")
# The libraries' own, and the driver's where it is not PyTorch's allocator that asks.
_DEVICE_SIGNS = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "out of memory")


def memory_lacking(error: BaseException, device: torch.device) -> Literal["device", "host"] | None:
    """Whose memory an error says has run out. A CPU's own memory is its device's."""
    found: Literal["device", "host"] | None = None
    if isinstance(error, torch.OutOfMemoryError):
        found = "device"
    elif isinstance(error, MemoryError):
        found = "host"
    elif isinstance(error, RuntimeError):  # neither allocator below has a class of its own
        if any(sign in str(error) for sign in _HOST_SIGNS):
            found = "host"
        elif any(sign in str(error) for sign in _DEVICE_SIGNS):
            found = "device"
    return "device" if found and device.type == "cpu" else found


def page_locked(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Host memory that the GPU copies to and from beside other work.

    Where no more can be locked (a container's limit, a busy host), what PyTorch keeps for reuse is
    given back first; then it is ordinary memory, and the copy takes longer.
    """
    for last in (False, True):
        try:
            return torch.empty(tuple(shape), dtype=dtype, device="cpu", pin_memory=True)
        except RuntimeError as error:
            if memory_lacking(error, torch.device("cuda")) is None:
                raise
            if not last:
                _empty_host_cache()
            else:
                logger.warning(
                    "no page-locked host memory is left (%s); copies go through ordinary memory",
                    str(error).splitlines()[0],
                )
    return torch.empty(tuple(shape), dtype=dtype, device="cpu")


def _empty_host_cache() -> None:
    if hasattr(torch.accelerator, "empty_host_cache"):  # not in every torch
        torch.accelerator.empty_host_cache()
