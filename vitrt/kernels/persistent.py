"""How many programs a persistent kernel is launched with: the device full, none without work."""

from __future__ import annotations

from functools import lru_cache

import torch


@lru_cache(maxsize=16)
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; an XPU calls them subslices."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    if device.type == "xpu":
        return torch.xpu.get_device_properties(device).gpu_subslice_count
    return 2  # Triton's interpreter: few, so that each program strides over several items


@lru_cache(maxsize=16)
def is_hopper(device: torch.device) -> bool:
    """Whether the tilings measured on an H200 apply, and with them NVIDIA's limit of registers."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device)[0] == 9


def forget_devices() -> None:
    """Ask the devices again: for a process that pretends to have another GPU, to compile for it."""
    processors.cache_clear()
    is_hopper.cache_clear()


def programs(work: int, per_processor: int, device: torch.device) -> int:
    """The grid for at most `work` items, `per_processor` programs on each multiprocessor."""
    return max(1, min(work, processors(device) * per_processor))
