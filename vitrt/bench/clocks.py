"""The clock and the power that a GPU ran at while something was timed."""

from __future__ import annotations

import importlib.util
import logging
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

logger = logging.getLogger(__name__)

PERIOD = 0.25  # seconds; a GPU averages its power over about as long
QUERY = "--query-gpu=clocks.sm,power.draw"


@dataclass(frozen=True, slots=True)
class Clocks:
    """Medians over a span of time."""

    sm_mhz: float
    watts: float


Read = Callable[[], Clocks]


def reader_for(device: torch.device) -> Read | None:
    """What asks the driver about `device`; None where nothing can."""
    if device.type != "cuda":
        return None
    if importlib.util.find_spec("pynvml") is not None:
        return lambda: Clocks(torch.cuda.clock_rate(device), torch.cuda.power_draw(device) / 1e3)
    if shutil.which("nvidia-smi") is not None:
        which = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        command = ["nvidia-smi", f"--id={which}", QUERY, "--format=csv,noheader,nounits"]

        def read() -> Clocks:
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            mhz, watts = text.split(",")
            return Clocks(float(mhz), float(watts))

        return read
    return None


class ClockSampler:
    """Reads clock and power in a thread until it is left; what cannot be read yields nothing."""

    def __init__(self, read: Read | None, period: float = PERIOD) -> None:
        self._read, self._period = read, period
        self._samples: list[tuple[float, Clocks]] = []
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="vitrt-clocks", daemon=True)

    def __enter__(self) -> ClockSampler:
        if self._read is not None:
            self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._left.set()
        if self._thread.is_alive():
            self._thread.join()

    def _sample(self) -> None:
        assert self._read is not None
        while not self._left.wait(self._period):
            try:
                clocks = self._read()
            except Exception as error:  # drivers and containers fail in many ways
                logger.debug("no clocks: %s", error)
                return
            self._samples.append((time.monotonic(), clocks))

    def since(self, start: float) -> Clocks | None:
        """Medians from `start` (of time.monotonic) until now; None without a sample."""
        found = [clocks for moment, clocks in list(self._samples) if moment >= start]
        if not found:
            return None
        return Clocks(
            statistics.median(clocks.sm_mhz for clocks in found),
            statistics.median(clocks.watts for clocks in found),
        )
