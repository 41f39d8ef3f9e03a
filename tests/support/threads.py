"""Threads that are known to be in the same place at the same time."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Arrivals:
    """Knows when so many threads have come to a place, each of them counted once."""

    def __init__(self, count: int) -> None:
        self.all_came = threading.Event()
        self._count = count
        self._came: set[int] = set()
        self._lock = threading.Lock()

    def arrive(self) -> None:
        with self._lock:
            self._came.add(threading.get_ident())
            if len(self._came) == self._count:
                self.all_came.set()


def in_threads(count: int, work: Callable[[], object]) -> None:
    """Run `work` in each of so many threads; raises what one of them raised."""
    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
