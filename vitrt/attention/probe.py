"""What is installed and what a device can do, answered without importing anything heavy."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch

HALF_PRECISION = (torch.bfloat16, torch.float16)


def installed(module: str) -> bool:
    """Whether `module` can be found.

    Its parent packages are looked at, not imported: theirs may load CUDA code.
    """
    top, *inner = module.split(".")
    try:
        spec = find_spec(top)
    except (ImportError, ValueError):
        return False
    if spec is None or not inner:
        return spec is not None
    relative = Path(*inner)
    return any(
        (Path(place) / relative / "__init__.py").is_file()
        or (Path(place) / relative).with_suffix(".py").is_file()
        for place in spec.submodule_search_locations or ()
    )


def cuda_capability(device: torch.device) -> tuple[int, int] | None:
    """An NVIDIA device's compute capability; None for any other, ROCm's too, or where none is."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(device)


def _dotted(capability: tuple[int, int]) -> str:
    return f"compute capability {capability[0]}.{capability[1]}"


def not_nvidia(
    device: torch.device, least: tuple[int, int], below: tuple[int, int], made_for: str
) -> str | None:
    """None for an NVIDIA device of `least` <= capability < `below`, or the reason why not."""
    capability = cuda_capability(device)
    if capability is None:
        return f"needs {made_for}, and the device is {device.type}"
    if not least <= capability < below:
        return f"needs {made_for}, and the device has {_dotted(capability)}"
    return None


def not_triton(device: torch.device) -> str | None:
    """None where Triton compiles for the device, or the reason why it does not."""
    if not installed("triton"):
        return "triton is not installed"
    if device.type == "cuda" and not torch.cuda.is_available():
        return "there is no CUDA device"
    if device.type not in ("cuda", "xpu"):
        return f"Triton compiles for CUDA and XPU devices, and the device is {device.type}"
    capability = cuda_capability(device)
    if capability is not None and capability < (8, 0):
        return f"needs compute capability 8.0 or newer, and the device has {_dotted(capability)}"
    return None


def wrong_shape(
    dtype: torch.dtype, head_dim: int, dtypes: tuple[torch.dtype, ...], most: int
) -> str | None:
    """None for one of `dtypes` and a head size that is a multiple of 8 up to `most`, or why not."""
    if dtype not in dtypes:
        names = " or ".join(str(allowed).removeprefix("torch.") for allowed in dtypes)
        return f"needs {names}, and the dtype is {str(dtype).removeprefix('torch.')}"
    if head_dim % 8 or not 8 <= head_dim <= most:
        return f"needs a head size that is a multiple of 8 up to {most}, and it is {head_dim}"
    return None


def no_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """None where our own attention kernels run, or the reason why they do not."""
    return not_triton(device) or wrong_shape(dtype, head_dim, (*HALF_PRECISION, torch.float32), 128)
