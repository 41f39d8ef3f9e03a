"""Records submitted to a pipeline while they are found."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from vitrt.engine.window import Window
from vitrt.sources.record import Record


class Listing:
    """A thread that lists, and waits where the window is full. Leaving it waits for its end."""

    def __init__(
        self,
        records: Iterable[Record],
        window: Window[Record, Record],
        then: Callable[[int], Iterable[Record]] = lambda listed: (),
    ) -> None:
        """`then`, given how many records there were, gives what comes after them; it may wait."""
        self.listed = 0  # images found so far
        self.all_listed = False  # it came to its end: not where it was stopped, or failed
        self._records = records
        self._window = window
        self._then = then
        self._thread = threading.Thread(target=self._run, name="vitrt-list", daemon=True)

    def _run(self) -> None:
        failure: BaseException | None = None
        try:
            for record in self._records:
                if not self._window.submit(record, record):
                    break
                self.listed += 1
            self.all_listed = not self._window.stopped  # records may end early by themselves then
            self._window.pause()
            for record in self._then(self.listed):
                if not self._window.submit(record, record):
                    break
                self._window.pause()
        except BaseException as error:
            failure = error
        finally:
            self._window.close(failure)

    def __enter__(self) -> Listing:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._thread.join()
