"""Items prepared by threads ahead of the device, in the order they came, in bounded memory."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Generic, TypeVar

from vitrt.engine.stages import Prepared

K = TypeVar("K")  # what an item is known by
I = TypeVar("I")  # noqa: E741  an item

_IDLE = 0.2  # seconds between looks at whether to stop, which comes from a signal and wakes nobody


class Window(Generic[K, I]):
    """Any thread submits, one takes. A context manager: leaving it ends the threads."""

    def __init__(
        self, prepare: Callable[[I], Prepared], *, workers: int, most_items: int, most_bytes: int
    ) -> None:
        """`workers` threads prepare. At most `most_items` and about `most_bytes` of pixels wait."""
        self._prepare = prepare
        self._most_items = most_items
        self._most_bytes = most_bytes
        self._pool = ThreadPoolExecutor(workers, "vitrt-decode")
        self._changed = threading.Condition()
        self._items: deque[tuple[K, Future[Prepared]]] = deque()
        self._submitted = self._begun = self._taken = 0
        self._bytes = 0  # prepared and waiting
        self._closed = self._paused = False
        self.failure: BaseException | None = None  # of what submits
        self._stopped = False  # not an Event, whose `set` takes a lock

    def __len__(self) -> int:
        return len(self._items)

    @property
    def has_room(self) -> bool:
        return len(self._items) < self._most_items

    @property
    def stopped(self) -> bool:
        return self._stopped

    @property
    def ended(self) -> bool:
        """Whether all that will ever come was taken."""
        return self._closed and not self._items  # in this order

    @property
    def paused(self) -> bool:
        """Whether all that came was taken, and nothing comes for now."""
        return self._paused and not self._items  # in this order

    @property
    def waiting(self) -> int:
        """Items prepared and not yet taken."""
        return sum(future.done() for _, future in list(self._items))

    def submit(self, key: K, item: I) -> bool:
        """Wait for room, then queue. False where it was stopped instead."""
        with self._changed:
            while not (self.has_room or self.stopped):
                self._changed.wait(_IDLE)
            if self.stopped:
                return False
            if self._closed:
                raise ValueError(f"{key!r} was submitted after the last")
            number, self._submitted = self._submitted, self._submitted + 1
            future = self._pool.submit(self._prepare_in_turn, item, number)
            self._items.append((key, future))
            self._paused = False
            self._changed.notify_all()
        return True

    def pause(self) -> None:
        """Nothing comes for now: what came before need not wait for it. Until the next `submit`."""
        self._paused = True

    def close(self, failure: BaseException | None = None) -> None:
        """Nothing more comes, because of `failure` if there was one."""
        with self._changed:
            self.failure, self._closed = failure, True
            self._changed.notify_all()

    def stop(self) -> None:
        """Prepare no more. Safe in a signal handler."""
        # Takes no lock, which the interrupted code may hold: waiting threads look now and then.
        self._stopped = True

    def is_ready(self) -> bool:
        """Whether the next item, or its error, can be taken."""
        return bool(self._items) and self._items[0][1].done()

    def wait(self, timeout: float = _IDLE) -> None:
        """Wait until the next item is ready, for at most `timeout` and a fifth of a second."""
        timeout = min(timeout, _IDLE)
        if self._items:
            wait([self._items[0][1]], timeout)
            return
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._closed, timeout)

    def take(self) -> tuple[K, Prepared | Exception]:
        """The next item, which is ready."""
        with self._changed:
            key, future = self._items.popleft()
            self._taken += 1
            error = future.exception()
            if error is None:
                self._bytes -= future.result().nbytes
            self._changed.notify_all()
        if error is not None and not isinstance(error, Exception):
            raise error
        return key, error or future.result()

    def _prepare_in_turn(self, item: I, number: int) -> Prepared:
        with self._changed:
            # In order of submission, since threads wake in any and what came first is wanted first.
            # The item that is to be taken next is always let in, however large.
            while not self.stopped and (
                number != self._begun or (self._bytes >= self._most_bytes and number != self._taken)
            ):
                self._changed.wait(_IDLE)
            self._begun += 1
            self._changed.notify_all()
        if self.stopped:
            raise RuntimeError("stopped")  # nobody takes it
        image = self._prepare(item)
        with self._changed:
            self._bytes += image.nbytes
        return image

    def __enter__(self) -> Window[K, I]:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()
        with self._changed:
            self._items.clear()
            self._changed.notify_all()
            self._pool.shutdown(wait=False, cancel_futures=True)
        self._pool.shutdown()
