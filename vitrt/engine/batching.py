"""Many images through an encoder: decoded by threads, packed under a token budget, in order."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, TypeVar

import torch

from vitrt.features import ImageFeatures, join
from vitrt.images.processor import ImageInput, PreparedImage

if TYPE_CHECKING:
    from vitrt.engine.dense import AnyEncoder

T = TypeVar("T")

_MAX_WORKERS = 16
_POLL = 0.002  # seconds between looks at the device
_SLOW = 0.02  # seconds that a source may take for an image
_WARY = 16  # images that must come faster before it is asked freely again


def default_workers(cores: int | None = None) -> int:
    """Decoding threads: three for four `cores` (None: those this process may use), within reason.

    The thread that launches, which they would keep from its core, is worth more than the fourth:
    on 16 cores, 448 x 448 JPEGs go 5% faster with 12 of them than with 16.
    """
    cores = usable_cores() if cores is None else cores
    return min(max(cores - cores // 4, 1), _MAX_WORKERS)


def usable_cores() -> int:
    """The cores that this process may run on, which may be fewer than the machine has."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return cores or 1


def encode_in_order(encoder: AnyEncoder, images: Sequence[ImageInput]) -> list[ImageFeatures]:
    """Features of all images in input order; equal lists always go in equal batches.

    While the device runs one of them, the next is decoded.
    """
    if len(images) == 1:  # not worth a thread
        return _encode_batch(encoder, [encoder.processor.prepare(images[0])])
    pace = _Pace(encoder.device, full_batches=True)
    return list(_in_order(encoder, images, default_workers(), pace))


def stream_in_order(
    encoder: AnyEncoder,
    images: Iterable[ImageInput],
    *,
    workers: int | None = None,
) -> Iterator[ImageFeatures]:
    """Features one after the other, in input order, with a bounded number of images in memory.

    Decoding runs ahead by a window; each time the device runs out of work, what is decoded and next
    in line goes as one batch. What the source or an image raises comes after the features of all
    images before it.
    """
    # Ranks that share a tower must make the same batches, however fast each decodes.
    pace = _Pace(encoder.device, full_batches=encoder.parallel.tp_size > 1)
    yield from _in_order(encoder, images, workers or default_workers(), pace)


def _in_order(
    encoder: AnyEncoder, images: Iterable[ImageInput], workers: int, pace: _Pace
) -> Iterator[ImageFeatures]:
    with ThreadPoolExecutor(workers, thread_name_prefix="vitrt-decode") as pool:
        ahead = _LookAhead(images, pool, encoder.processor.prepare, 2 * workers)
        try:
            while batch := ahead.take(encoder.max_batch_tokens, pace.wants_more):
                features = _encode_batch(encoder, batch)
                pace.mark()
                yield from features
        finally:
            ahead.cancel()


def _encode_batch(encoder: AnyEncoder, batch: Sequence[PreparedImage]) -> list[ImageFeatures]:
    """Features of a batch; a clip over the budget, which is one by itself, goes in several."""
    if len(batch) > 1:
        return encoder.encode_prepared(batch)
    return [
        join(
            [
                features
                for part in batch[0].split(encoder.max_batch_tokens)
                for features in encoder.encode_prepared([part])
            ]
        )
    ]


def prepare_all(prepare: Callable[[T], PreparedImage], items: Sequence[T]) -> list[PreparedImage]:
    """`prepare` of every item, in order, by threads on all cores: nothing else is to be done."""
    workers = min(usable_cores(), _MAX_WORKERS, len(items))
    if workers <= 1:
        return [prepare(item) for item in items]
    with ThreadPoolExecutor(workers, thread_name_prefix="vitrt-decode") as pool:
        return list(pool.map(prepare, items))


class _LookAhead:
    """A window of images being decoded, taken from its front a batch at a time.

    The source is asked by the thread that takes. One that was slow (a queue, say, with nothing in
    it) is for its next images asked only while the device has work or nothing is in hand: what is
    in hand does not wait for it.
    """

    def __init__(
        self,
        images: Iterable[ImageInput],
        pool: ThreadPoolExecutor,
        prepare: Callable[[ImageInput], PreparedImage],
        size: int,
    ) -> None:
        self._source = iter(images)
        self._ended = False
        self._wary = 0  # images for which that holds
        self._pool = pool
        self._prepare = prepare
        self._size = size
        self._window: deque[Future[PreparedImage]] = deque()

    def take(self, budget: int, wants_more: Callable[[], bool]) -> list[PreparedImage]:
        """The next images, of at most `budget` patches together or one that has more.

        None are the end. They are fewer than would fit where the next one is not decoded yet and
        the device `wants_more`, or where it failed: that is raised by the next call.
        """
        batch: list[PreparedImage] = []
        room = budget
        while True:
            self._fill(batch, wants_more)
            if not self._window:
                return batch
            head = self._window[0]
            if batch:
                while not head.done():
                    if wants_more():
                        return batch
                    wait([head], timeout=_POLL)
                if head.exception() is not None or head.result().num_patches > room:
                    return batch
            batch.append(head.result())
            self._window.popleft()
            room -= batch[-1].num_patches

    def cancel(self) -> None:
        for future in self._window:
            future.cancel()

    def _fill(self, batch: Sequence[PreparedImage], wants_more: Callable[[], bool]) -> None:
        while not self._ended and len(self._window) < self._size:
            if self._wary and (batch or self._window) and wants_more():
                return
            asked = time.monotonic()
            try:
                image = next(self._source)
            except StopIteration:
                self._ended = True
            except Exception as error:  # in its turn, as an image that cannot be decoded
                self._ended = True
                failed: Future[PreparedImage] = Future()
                failed.set_exception(error)
                self._window.append(failed)
            else:
                is_slow = time.monotonic() - asked > _SLOW
                self._wary = _WARY if is_slow else max(self._wary - 1, 0)
                self._window.append(self._pool.submit(self._prepare, image))


class _Pace:
    """When a batch goes: full, or once fewer than two are left for the device to do, the one that
    it runs and one behind it.
    """

    def __init__(self, device: torch.device, *, full_batches: bool) -> None:
        self._device = device
        self._full = full_batches
        self._ends: deque[torch.cuda.Event] = deque(maxlen=2)

    def mark(self) -> None:
        """Everything of one more batch is launched."""
        if self._device.type == "cuda" and not self._full:
            self._ends.append(torch.cuda.current_stream(self._device).record_event())

    def wants_more(self) -> bool:
        """Whether the device is to get what there is; on a CPU batches end with their launch."""
        return not self._full and (len(self._ends) < 2 or self._ends[0].query())
