"""Compile kernels for a GPU that this machine does not have.

Inside `compiling_for(chip)` tensors on "cuda" are PyTorch's fake ones, without memory, and a launch
of a Triton kernel compiles it, as the GPU itself would have it, into Triton's folder: the host
functions choose their tilings and the launch its specialisation as ever, and nothing runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from vitrt.kernels import persistent
from vitrt.kernels.dispatch import HAVE_TRITON


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


@dataclass(frozen=True, slots=True)
class Binary:
    """A Triton kernel as it would have been loaded onto the GPU."""

    name: str
    cubin: bytes
    warps: int
    shared_memory: int  # bytes of a block


class _Driver:
    """Triton's driver for a GPU that is not there: it loads into a list and launches nothing."""

    def __init__(self, chip: Chip, loaded: list[Binary]) -> None:
        self._chip = chip
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
        return lambda *args: None

    def _load(
        self, name: str, cubin: bytes, shared_memory: int, device: int
    ) -> tuple[None, None, int, int, int]:
        """Module, function, registers, spills, threads that a block may have."""
        self._loaded.append(Binary(name, cubin, self._warps, shared_memory))
        return None, None, 0, 0, 1024


@contextmanager
def compiling_for(chip: Chip) -> Iterator[list[Binary]]:
    """Be a process on `chip` that compiles and launches nothing; yields what it has compiled.

    For a process of its own: what torch says of its GPUs is replaced for all threads.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    if not HAVE_TRITON:
        raise ValueError("Triton is not installed: pip install triton")
    from triton.runtime.driver import driver

    properties = SimpleNamespace(multi_processor_count=chip.processors)
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "get_device_capability": lambda device=None: chip.capability,
        "get_device_name": lambda device=None: chip.name,
        "get_device_properties": lambda device=None: properties,
    }
    loaded: list[Binary] = []
    with ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(torch.cuda, **answers))
        stack.enter_context(mock.patch.object(driver, "_active", _Driver(chip, loaded)))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        persistent.forget_devices()
        stack.callback(persistent.forget_devices)
        yield loaded
