"""The cores of this process among the videos that its threads decode."""

from __future__ import annotations

import os
import threading
from bisect import insort
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

_MOST_THREADS = 16  # of one of FFmpeg's decoders
_OF_A_VIDEO = 4  # cores, while others wait


class Cores:
    """Which videos are decoded now, and with how many threads.

    To decode several at once, with a thread each, is less work than one with many: a frame of 1080p
    H.264 costs 10 to 25% more where threads share it. But videos that share the cores all end late,
    and the device waits for the first. Hence a few at once, those that came first.
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
        """Wait until it may be decoded: one for every four cores at once, but at least two."""
        most = max(_usable() // _OF_A_VIDEO, 2)
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
            threads = min(-(-_usable() // self._decoders), _MOST_THREADS)
        try:
            yield threads
        finally:
            with self._changed:
                self._decoders -= 1


def _usable() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


CORES = Cores()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=CORES.forget)
