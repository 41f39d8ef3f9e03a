"""A small Ray of this machine for one test module, stopped after it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def local_ray() -> Iterator[None]:
    """Two CPUs' worth of workers, which find this checkout."""
    import ray

    # Workers import what this process does; nothing outside it is asked, and no dashboard runs.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    ray.init(
        num_cpus=2,
        num_gpus=0,
        object_store_memory=150 << 20,
        include_dashboard=False,
        log_to_driver=False,
        address="local",
    )
    try:
        yield
    finally:
        ray.shutdown()
