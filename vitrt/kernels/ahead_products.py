"""quack's products, compiled for a GPU that this machine does not have: see ahead.py.

None is launched, and all are compiled in processes beside this one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from unittest import mock

import torch

from vitrt.cores import usable_cores
from vitrt.kernels import gemm_quack
from vitrt.kernels.disk_cache import keep_kernels
from vitrt.kernels.gemm_table import Kind, Tile

_MOST_WORKERS = 16
_PATIENCE = 60.0  # seconds for one more product of those in other processes


def has_quack() -> bool:
    """Whether it is installed: any folder of that name in the current one is found as well."""
    spec = find_spec("quack")
    return spec is not None and spec.origin is not None


@contextmanager
def quack_without_gpu() -> Iterator[None]:
    """quack's products are compiled, kept and never launched.

    How many clusters run at once is asked of the driver: it is an argument of a launch, not part of
    what is compiled, so any answer will do.
    """
    keep_kernels()
    from quack.cache import async_compile
    from quack.epilogue import frontend
    from quack.gemm_runtime import host

    async_compile._install_gpu_blind_device_attrs()
    async_compile._pin_dsl_arch(os.environ["CUTE_DSL_ARCH"])
    with (
        mock.patch.object(host, "get_max_active_clusters", return_value=1),
        mock.patch.object(host, "run_gemm_epi_plan"),
        mock.patch.object(frontend, "run_gemm_epi_plan"),
    ):
        yield


@contextmanager
def products_in_processes() -> Iterator[None]:
    """quack's products are compiled in processes beside this one, which goes on meanwhile.

    When the context ends all are there. One that fails in its process is compiled in this one,
    which raises what is wrong with it; so are all that are left when none has come for a while.
    """
    from quack.cache import CompilePending, pool_scope

    # Each of them imports CUTLASS, for most of a gigabyte and longer than it compiles.
    workers = min(usable_cores(), _MOST_WORKERS)
    os.environ.setdefault("QUACK_COMPILE_WORKERS", str(workers))
    compile_one = gemm_quack.compiled
    pending: list[tuple[Kind, Tile, torch.dtype, torch.device]] = []

    def begin(
        kind: Kind, tile: Tile, dtype: torch.dtype, device: torch.device
    ) -> gemm_quack.FusedProduct:
        try:
            return compile_one(kind, tile, dtype, device)
        except CompilePending:
            pending.append((kind, tile, dtype, device))
            return gemm_quack.FusedProduct(kind, dtype, mock.Mock())  # which launches nothing

    with pool_scope(), mock.patch.object(gemm_quack, "compiled", begin):
        yield
        newest = time.monotonic()
        while pending and time.monotonic() - newest < _PATIENCE:
            time.sleep(0.1)
            waiting, pending[:] = pending[:], []
            for product in waiting:
                begin(*product)
            if len(pending) < len(waiting):
                newest = time.monotonic()
    for product in pending:
        compile_one(*product)
