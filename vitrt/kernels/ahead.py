"""Compile kernels for a GPU that this machine does not have.

Inside `compiling_for(chip)` tensors on "cuda" are PyTorch's fake ones, without memory, and a launch
of a Triton kernel compiles it, as the GPU itself would have it, into Triton's folder: the host
functions choose their tilings and the launch its specialisation as ever, and nothing runs.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from vitrt.kernels import kept, persistent
from vitrt.kernels.ahead_products import has_quack, products_in_processes, quack_without_gpu
from vitrt.kernels.disk_cache import private_folder
from vitrt.kernels.dispatch import HAVE_TRITON
from vitrt.kernels.triton_launchers import LauncherBuilder


@dataclass(frozen=True, slots=True)
class Chip:
    """What of a GPU decides how kernels are compiled and launched."""

    arch: str
    name: str  # as CUDA gives it
    capability: tuple[int, int]
    processors: int
    shared_memory: int  # bytes that one block may ask for


_KIB = 1024
CHIPS = {
    chip.arch: chip
    for chip in (
        Chip("sm_80", "NVIDIA A100-SXM4-80GB", (8, 0), 108, 163 * _KIB),
        Chip("sm_86", "NVIDIA A10", (8, 6), 72, 99 * _KIB),
        Chip("sm_89", "NVIDIA L40S", (8, 9), 142, 99 * _KIB),
        Chip("sm_90a", "NVIDIA H100 80GB HBM3", (9, 0), 132, 227 * _KIB),
        Chip("sm_100a", "NVIDIA B200", (10, 0), 148, 227 * _KIB),
        Chip("sm_120a", "NVIDIA RTX PRO 6000 Blackwell Server Edition", (12, 0), 188, 99 * _KIB),
    )
}


def chip_of(arch: str) -> Chip:
    """The chip of "sm_90a", or of "sm_90" or "90"; ValueError naming those there are."""
    known = {name.strip("sm_a"): chip for name, chip in CHIPS.items()}
    chip = known.get(arch.strip("sm_a"))
    if chip is None:
        raise ValueError(f"arch {arch!r} is unknown; there are {', '.join(CHIPS)}")
    return chip


def kept_in() -> list[str]:
    """The folders that compiled kernels go to; ValueError where there is none to keep them in."""
    if not HAVE_TRITON:
        raise ValueError("compiling needs Triton, which is not installed: pip install triton")
    from triton import knobs

    folder = private_folder()
    if folder is None:
        raise ValueError(
            "no folder to keep kernels in: neither $XDG_CACHE_HOME (~/.cache) nor the folder for "
            "temporary files can be written and locked by this user alone"
        )
    return [str(folder), knobs.cache.dir]


@dataclass(frozen=True, slots=True)
class Binary:
    """A Triton kernel as it would have been loaded onto the GPU."""

    name: str
    cubin: bytes
    warps: int
    shared_memory: int  # bytes of a block


class _Driver:
    """Triton's driver for a GPU that is not there: it loads into a list and launches nothing."""

    def __init__(
        self, chip: Chip, loaded: list[Binary], launchers: LauncherBuilder | None = None
    ) -> None:
        self._chip = chip
        self._launchers = launchers
        self._loaded = loaded
        self._warps = 0
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": chip.shared_memory},
            load_binary=self._load,
        )

    def get_current_device(self) -> int:
        major, minor = self._chip.capability
        return 10 * major + minor  # Triton keeps what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.get_current_device(), 32)

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        self._warps = metadata.num_warps  # of what is loaded next
        if self._launchers is not None:
            self._launchers.launcher(source, metadata)
        return lambda *args: None

    def _load(
        self, name: str, cubin: bytes, shared_memory: int, device: int
    ) -> tuple[str, str, int, int, int]:
        """Module, function, registers, spills, threads that a block may have."""
        self._loaded.append(Binary(name, cubin, self._warps, shared_memory))
        return name, name, 0, 0, 1024


class _Nothing(TorchDispatchMode):
    """Nothing is written into a tensor without memory."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.copy_.default:
            return args[0]
        if kwargs and kwargs.get("out") is not None:
            return kwargs["out"]
        return func(*args, **(kwargs or {}))


class _Reading(TorchFunctionMode):
    """A number that is read back is 1; and views by integers and slices, which a torch without CUDA
    refuses its own fake tensors.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.__float__:
            return 1.0
        if func is not torch.Tensor.__getitem__:
            return func(*args, **(kwargs or {}))
        tensor, index = args
        axis = 0
        for step in index if isinstance(index, tuple) else (index,):
            if step is None:
                tensor = tensor.unsqueeze(axis)
            elif isinstance(step, int):
                tensor = tensor.select(axis, step)
                continue
            else:
                first, last, stride = step.indices(tensor.shape[axis])
                assert stride == 1
                tensor = tensor.narrow(axis, first, max(last - first, 0))
            axis += 1
        return tensor


@contextmanager
def compiling_for(chip: Chip, *, launchers: bool = False) -> Iterator[list[Binary]]:
    """Be a process on `chip` that compiles and launches nothing; yields Triton's binaries.

    With `launchers` also what Triton has a C compiler make for each kernel and once for all.

    For a process of its own, which has imported neither quack nor flash-attn-4: what torch and
    they say of GPUs is replaced for all threads, and stays so for the two.
    """
    from torch._subclasses import fake_tensor
    from triton.runtime.driver import driver

    loaded: list[Binary] = []
    builder = LauncherBuilder() if launchers else None
    if builder is not None:
        builder.utilities()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(torch.cuda, **_answers(chip)))
        stack.enter_context(mock.patch.object(driver, "_active", _Driver(chip, loaded, builder)))
        stack.enter_context(mock.patch.dict(os.environ, _variables(chip)))
        # What runs here is compiled, if it was kept or not.
        stack.enter_context(mock.patch.object(kept, "load", return_value=None))
        if has_quack() and chip.capability[0] == 9:
            stack.enter_context(quack_without_gpu())
        # The first of its tensors "on cuda" would look for a GPU, and raise where there is none.
        stack.enter_context(mock.patch.object(fake_tensor, "init_gpu_context"))
        stack.enter_context(fake_tensor.FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_Nothing())
        stack.enter_context(_Reading())
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        persistent.forget_devices()
        stack.callback(persistent.forget_devices)
        if "quack" in sys.modules:  # imported above
            stack.enter_context(products_in_processes())
        yield loaded


def _answers(chip: Chip) -> dict[str, Any]:
    """What torch.cuda says on `chip`."""
    properties = SimpleNamespace(multi_processor_count=chip.processors)
    return {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "get_device_capability": lambda device=None: chip.capability,
        "get_device_name": lambda device=None: chip.name,
        "get_device_properties": lambda device=None: properties,
        "device": nullcontext,
    }


def _variables(chip: Chip) -> dict[str, str]:
    """What quack and flash-attn-4 read, which compile without a GPU where these are set."""
    arch = chip.arch.removesuffix("a")
    return {
        "CUTE_DSL_ARCH": chip.arch,
        "QUACK_ARCH": arch,
        "FLASH_ATTENTION_ARCH": arch,
        "FLASH_ATTENTION_NUM_SMS": str(chip.processors),
    }
