"""A small Ray of this machine, stopped after the tests that need it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

# Read when Ray starts. Nothing outside this machine is asked, and workers import what this process
# does. A machine may be slow, and busy with other tests: no worker is given up for that.
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_worker_register_timeout_seconds": "300",
    "RAY_raylet_start_wait_time_s": "300",
}


@contextmanager
def local_ray() -> Iterator[None]:
    """Two CPUs' worth of workers, which find this checkout. Its files and processes end with it."""
    os.environ.update(SETTINGS)
    import ray

    # Sockets lie in it, whose paths have at most 107 characters: not below pytest's folders.
    with tempfile.TemporaryDirectory("ray", dir="/tmp", ignore_cleanup_errors=True) as folder:
        ray.init(
            num_cpus=2,
            num_gpus=0,
            object_store_memory=150 << 20,  # in /tmp where /dev/shm has less
            include_dashboard=False,
            log_to_driver=False,
            address="local",
            _temp_dir=folder,
        )
        try:
            yield
        finally:
            ray.shutdown()
