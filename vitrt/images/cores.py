"""The cores of this process among the videos that its threads decode."""

from __future__ import annotations

import os
import threading
from bisect import insort
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

from vitrt.cores import usable_cores

_MOST_THREADS = 16  # of one of FFmpeg's decoders
_OF_A_VIDEO = 2  # cores, while others wait
_BUSY = 2  # threads for a core: those of one video wait for each other


class Cores:
    """Which videos are decoded now, and with how many threads.

    To decode several at once, with a thread each, is less work than one with many: a frame of 1080p
    H.264 costs 10 to 25% more where threads share it. But videos that share the cores all end late,
    and the device waits for the first. Hence some at once, those that came first. On 16 cores, in
    frames a second of 1080p: 16 videos with a thread each 2400, 8 with four 2470, 4 with four 1950,
    one with sixteen 1270.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Start anew, in the child of a fork: it has none of the threads that decode here."""
        self._changed = threading.Condition()
        self._arrivals = count()
        self._line: list[int] = []  # arrivals of those that are decoded, or wait for it
        self._decoders = 0  # that are open now

    def arrive(self) -> int:
        """A number larger than all before, for a video that is asked for now."""
        return next(self._arrivals)

    @contextmanager
    def turn(self, arrival: int) -> Iterator[None]:
        """Wait until it may be decoded: one for every two cores at once, but at least two."""
        most = max(usable_cores() // _OF_A_VIDEO, 2)
        with self._changed:
            insort(self._line, arrival)
        try:
            with self._changed:
                self._changed.wait_for(lambda: arrival in self._line[:most])
            yield
        finally:
            with self._changed:
                self._line.remove(arrival)
                self._changed.notify_all()

    @contextmanager
    def share(self) -> Iterator[int]:
        """How many threads one more decoder gets."""
        with self._changed:
            self._decoders += 1
            threads = min(-(-_BUSY * usable_cores() // self._decoders), _MOST_THREADS)
        try:
            yield threads
        finally:
            with self._changed:
                self._decoders -= 1


CORES = Cores()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=CORES.forget)
