"""Images decoded by threads ahead of the device, in the order of listing, in bounded memory."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from vitrt.images.processor import ImageError, PreparedImage
from vitrt.sources.record import Record

logger = logging.getLogger(__name__)

_AHEAD_PER_WORKER = 8
_MIN_AHEAD = 64
DEFAULT_AHEAD_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Decoded:
    """An image ready for the device, or why it is not."""

    source: Record
    image: PreparedImage | None
    error_class: str = ""
    message: str = ""


class DecodeAhead:
    """Iterates over `Decoded` in the order of `sources`.

    At most a fixed number of images and about `max_bytes` of pixels wait at any moment; listing
    runs in a thread of its own and stops where the window is full. Use as a context manager:
    leaving it ends the threads.
    """

    def __init__(
        self,
        sources: Iterable[Record],
        prepare: Callable[[Record], PreparedImage],
        *,
        workers: int,
        max_bytes: int = DEFAULT_AHEAD_BYTES,
    ) -> None:
        self._sources = sources
        self._prepare = prepare
        self._max_items = max(_AHEAD_PER_WORKER * workers, _MIN_AHEAD)
        self._max_bytes = max_bytes
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="vitrt-decode")
        self._changed = threading.Condition()
        self._window: deque[Future[Decoded]] = deque()
        self._bytes = 0  # decoded and waiting
        self._listed = 0
        self._taken = 0
        self._finished = False  # listing, to its end or not
        self._all_listed = False
        self._failure: BaseException | None = None  # of listing
        self._stop = False  # not an Event, whose `set` takes a lock
        self._lister = threading.Thread(target=self._list, name="vitrt-list", daemon=True)

    @property
    def listed(self) -> int:
        """Images found so far."""
        return self._listed

    @property
    def all_listed(self) -> bool:
        """Whether listing came to its end: not where it was stopped, or failed."""
        return self._all_listed

    @property
    def waiting(self) -> int:
        """Images decoded and not yet taken."""
        return sum(future.done() for future in list(self._window))

    def stop(self) -> None:
        """List and decode no more; iteration ends at the next image. Safe in a signal handler."""
        # Takes no lock, which the interrupted code may hold: waiting threads look now and then.
        self._stop = True

    def _stopped(self) -> bool:
        return self._stop

    def __enter__(self) -> DecodeAhead:
        self._lister.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop = True
        self._lister.join()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __iter__(self) -> Iterator[Decoded]:
        while not self._stopped():
            with self._changed:
                self._changed.wait_for(self._may_take, timeout=0.2)
                if not self._window:
                    if self._failure is not None:
                        raise self._failure
                    if self._finished:
                        return
                    continue
                future = self._window[0]
            decoded = future.result()
            if self._stopped():
                return
            with self._changed:
                self._window.popleft()
                self._taken += 1
                if decoded.image is not None:
                    self._bytes -= decoded.image.pixels.nbytes
                self._changed.notify_all()
            yield decoded

    def _may_take(self) -> bool:
        return bool(self._window) or self._finished or self._stopped()

    def _list(self) -> None:
        try:
            for source in self._sources:
                with self._changed:
                    while not self._stopped() and len(self._window) >= self._max_items:
                        self._changed.wait(timeout=0.2)
                    if self._stopped():
                        return
                    self._window.append(self._pool.submit(self._decode, source, self._listed))
                    self._listed += 1
                    self._changed.notify_all()
            self._all_listed = not self._stopped()  # sources may end early by themselves then
        except BaseException as error:
            self._failure = error
        finally:
            with self._changed:
                self._finished = True
                self._changed.notify_all()

    def _decode(self, source: Record, number: int) -> Decoded:
        with self._changed:
            # The image that the consumer waits for is always let in, however large.
            while not self._stopped() and self._bytes >= self._max_bytes and number != self._taken:
                self._changed.wait(timeout=0.2)
        if self._stopped():
            return Decoded(source, None)
        decoded = decode_one(source, self._prepare)
        if decoded.image is not None:
            with self._changed:
                self._bytes += decoded.image.pixels.nbytes
        return decoded


def decode_one(source: Record, prepare: Callable[[Record], PreparedImage]) -> Decoded:
    """The image, or its error: whatever a broken file makes a decoder raise ends here."""
    if source.problem is not None:
        return Decoded(source, None, ImageError.__name__, f"{source.id}: {source.problem}")
    try:
        return Decoded(source, prepare(source))
    except Exception as error:
        if not isinstance(error, ImageError):
            logger.debug("unexpected error from %s", source.id, exc_info=True)
        message = str(error) or type(error).__name__
        if source.id not in message:
            message = f"{source.id}: {message}"
        return Decoded(source, None, type(error).__name__, message)
