"""Where a tower runs, in which dtype, and how many patches it takes at once."""

from __future__ import annotations

import logging

import torch

from vitrt.config import VisionConfig
from vitrt.kernels import gemm_fp8
from vitrt.kernels.dispatch import HAVE_TRITON
from vitrt.models.tower import VisionTower

logger = logging.getLogger(__name__)

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_DEVICES = ("cpu", "cuda", "xpu")
_CPU_PATCHES = 8192  # some 100 MiB of activations: larger batches do not run faster on a CPU
_GPU_PATCHES = 49152  # 150 images of 560 x 560: far past where the device is full
_FREE_SHARE = 0.5  # of the free memory that activations may take


def resolve_device(name: str) -> torch.device:
    """CUDA where there is one for "auto", else the CPU.

    ValueError for one that is not there, or that towers do not run on.
    """
    if name == "auto":
        return (
            torch.device("cuda", torch.cuda.current_device())
            if torch.cuda.is_available()
            else torch.device("cpu")
        )
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is unknown; {_choices()}") from error
    if device.type not in _DEVICES:
        raise ValueError(f"device {name!r} is not supported; {_choices()}")
    if device.type == "xpu" and not torch.xpu.is_available():
        raise ValueError(f"device {name!r} asked for, but no XPU is available; {_choices()}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(
                f"device {name!r} asked for, but no CUDA device is available; {_choices()}"
            )
        if ":" not in name:
            return torch.device("cuda", torch.cuda.current_device())
        if device.index >= torch.cuda.device_count():
            raise ValueError(
                f"device {name!r} asked for, but there are {torch.cuda.device_count()} CUDA devices"
            )
    return device


def _choices() -> str:
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if torch.xpu.is_available():
        gpus += [f"xpu:{index}" for index in range(torch.xpu.device_count())]
    return f"here are {', '.join(['auto', 'cpu', *gpus])}"


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU and float32 on a CPU for "auto". ValueError for a dtype not supported."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in _DTYPES:
        raise ValueError(f"dtype {name!r} is not supported; use auto, {', '.join(_DTYPES)}")
    if name == "float16":
        logger.warning(
            "float16 overflows in these towers on real weights; bfloat16 is the safe choice"
        )
    return _DTYPES[name]


def check_precision(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """ValueError where products cannot run in this precision."""
    if name != "fp8":
        return
    if dtype != torch.bfloat16:
        raise ValueError(
            f"precision 'fp8' needs dtype bfloat16 for what is not e4m3, got {dtype_name(dtype)}"
        )
    if (reason := gemm_fp8.unavailable(device)) is not None:
        raise ValueError(f"precision 'fp8' cannot run on {device}: {reason}")


def check_batch_invariant(device: torch.device) -> None:
    """ValueError where all known products depend on the number of rows."""
    if device.type != "cuda" or not HAVE_TRITON:
        raise ValueError(
            f"batch_invariant=True needs a CUDA device and Triton: on {device}, libraries choose "
            "how they add up by the number of rows"
        )


def dtype_name(dtype: str | torch.dtype) -> str:
    """A dtype as configs, manifests and people call it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def budget_from_memory(tower: VisionTower, device: torch.device, dtype: torch.dtype) -> int:
    """Patches per forward that fit in part of the device's free memory."""
    if device.type != "cuda":
        return _CPU_PATCHES
    free = torch.cuda.mem_get_info(device)[0]
    fitting = int(free * _FREE_SHARE) // (values_per_patch(tower.config) * dtype.itemsize)
    return max(min(fitting, _GPU_PATCHES), 256)


def values_per_patch(config: VisionConfig, kept_layers: int = 0) -> int:
    """Values that a patch takes at the widest moment of a forward."""
    # Residual, norm, MLP activations before and after gating, and pixels.
    block = 2 * config.hidden_size + 3 * config.intermediate_size + config.patch_dim
    # Hidden states as kept, in the order of the input, and in raster order.
    return block + 3 * kept_layers * config.hidden_size
