"""Items in, the features or the error of each out: prepared by threads, run in batches.

    submit -> prepare (threads, in order) -> batches under a budget -> device -> results

Everything on the way is bounded, so feeding waits for the device and not the other way round.
`encode`, `stream` and the job are loops over a pipeline.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch

from vitrt.cores import default_workers
from vitrt.engine.splitting import Deliver, Splitter, StoppedError
from vitrt.engine.stages import Prepared, Stages
from vitrt.engine.window import Window

K = TypeVar("K")  # what a result is known by
I = TypeVar("I")  # noqa: E741  an item
R = TypeVar("R")  # a result

_AHEAD_BYTES = 1 << 30  # of pixels that wait to be batched, about
_LOOK_AHEAD = 2  # budgets' worth of prepared images that batches are filled from out of order
_MOST_IMAGES = 512  # of them: what each costs beside its pixels adds up where images are tiny
_POLL = 0.002  # seconds between looks at the device
_SLOW = 0.02  # seconds that a source may take for an item
_WARY = 16  # items that must come faster before it is asked freely again


class Pipeline(Generic[K, I, R]):
    """A context manager. Any thread may `submit`; one iterates over `(key, result or error)`.

    Results come in the order of submission; with `in_order=False` batch by batch, and a batch may
    take prepared images from further behind that still fit. With `full_batches` equal items always
    make equal batches, however fast they come; without, what is prepared goes whenever the device
    runs out of work. The error of an item is its result; any other error of `run` is raised.
    """

    def __init__(
        self,
        stages: Stages[I],
        deliver: Deliver[R],
        *,
        join: Callable[[Sequence[R]], R] | None = None,
        workers: int | None = None,
        in_order: bool = True,
        full_batches: bool = True,
        ahead: int | None = None,
    ) -> None:
        """`join` makes one result of those of a clip's runs of frames; None: results are features.

        `workers` threads prepare (None: as cores permit). At most `ahead` items (None: two a
        worker) wait to be batched.
        """
        workers = workers or default_workers()
        self.window = window = Window[K, I](
            stages.prepare,
            workers=workers,
            most_items=ahead or 2 * workers,
            most_bytes=_AHEAD_BYTES,
        )
        self._splitter: Splitter[I, R] = Splitter(
            stages,
            deliver,
            join or stages.join,  # type: ignore[arg-type]
            lambda: window.stopped,
        )
        self._pace = _Pace(stages.device, full_batches=full_batches)
        self._in_order = in_order
        self._held: list[tuple[K, Prepared | Exception]] = []  # prepared, to be batched
        self._source: Iterator[tuple[K, I]] | None = None
        self._wary = 0  # items for which the source is asked only while the device has work

    def submit(self, key: K, item: I) -> bool:
        """Wait for room, then queue. False where the pipeline was stopped instead."""
        return self.window.submit(key, item)

    def close(self, failure: BaseException | None = None) -> None:
        """Nothing more comes; `failure` is raised after the results of all that came."""
        self.window.close(failure)

    def stop(self) -> None:
        """Iteration ends after what is on the device. Safe in a signal handler."""
        self.window.stop()

    def through(self, source: Iterable[tuple[K, I]]) -> Iterator[tuple[K, R | Exception]]:
        """The results of all that `source` yields, asked by the thread that iterates.

        A source that was slow (an empty queue, say) is asked for its next items only while the
        device has work or no prepared image waits, so that prepared images do not wait for it. What
        the source raises comes after the results of all before it.
        """
        self._source = iter(source)
        yield from self

    def __iter__(self) -> Iterator[tuple[K, R | Exception]]:
        for part in self.parts():
            yield from part

    def parts(self) -> Iterator[list[tuple[K, R | Exception]]]:
        """The results in parts: what one call of `deliver` gave, and the errors in between."""
        while True:
            self._gather()
            if self.window.stopped:
                return
            if not self._held:
                if self.window.failure is not None:
                    raise self.window.failure
                return
            budget = self._splitter.budget
            try:
                yield from self._run(take_batch(self._held, budget, in_order=self._in_order))
            except StoppedError:
                return

    def _run(
        self, batch: list[tuple[K, Prepared | Exception]]
    ) -> Iterator[list[tuple[K, R | Exception]]]:
        images = [image for _, image in batch if not isinstance(image, Exception)]
        parts = self._splitter.run(images)
        results: deque[R | Exception] = deque()
        part: list[tuple[K, R | Exception]] = []
        for key, image in batch:
            if isinstance(image, Exception):
                part.append((key, image))
                continue
            if not results:
                if part:
                    yield part
                results.extend(next(parts))
                self._pace.mark()
                part = []
            part.append((key, results.popleft()))
        yield part

    def _gather(self) -> None:
        """Hold what is prepared, in the order of submission, until a batch may go."""
        patches = sum(map(_patches, self._held))
        while not (self.window.stopped or self._suffices(patches)):
            self._pull()
            if self.window.is_ready():
                self._held.append(self.window.take())
                patches += _patches(self._held[-1])
            elif self.window.ended or self._may_go():
                return
            elif self._held and not self._pace.full_batches:
                self.window.wait(_POLL)
            else:
                self.window.wait()

    def _may_go(self) -> bool:
        """Whether what is held goes before there is more."""
        return bool(self._held) and (self.window.paused or self._pace.wants_more())

    def _suffices(self, patches: int) -> bool:
        """Whether a batch is full, or ends here anyway."""
        budget = self._splitter.budget
        if self._in_order:  # a batch ends before an image that does not fit, and at an error
            last_failed = bool(self._held) and isinstance(self._held[-1][1], Exception)
            return patches >= budget or last_failed
        return patches >= _LOOK_AHEAD * budget or len(self._held) >= _MOST_IMAGES

    def _pull(self) -> None:
        """Fill the window from the source, if this thread is to."""
        while self._source is not None and self.window.has_room:
            if self._wary and (self._held or self.window) and self._pace.wants_more():
                return
            asked = time.monotonic()
            try:
                key, item = next(self._source)
            except StopIteration:
                self._source = None
                self.close()
            except Exception as error:
                self._source = None
                self.close(error)
            else:
                is_slow = time.monotonic() - asked > _SLOW
                self._wary = _WARY if is_slow else max(self._wary - 1, 0)
                self.submit(key, item)

    def __enter__(self) -> Pipeline[K, I, R]:
        self.window.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.window.__exit__(*exception)


class _Pace:
    """Decides when a batch goes: when it is full, or once the device has fewer than two batches
    left, the one that it runs and the one after it.
    """

    def __init__(self, device: torch.device, *, full_batches: bool) -> None:
        self.full_batches = full_batches
        self._device = device
        self._ends: deque[torch.cuda.Event] = deque(maxlen=2)

    def mark(self) -> None:
        """Everything of one more batch is launched."""
        if self._device.type == "cuda" and not self.full_batches:
            self._ends.append(torch.cuda.current_stream(self._device).record_event())

    def wants_more(self) -> bool:
        """Whether the device is to get what there is; on a CPU batches end with their launch."""
        return not self.full_batches and (len(self._ends) < 2 or self._ends[0].query())


def take_batch(
    held: list[tuple[K, Prepared | Exception]], budget: int, *, in_order: bool
) -> list[tuple[K, Prepared | Exception]]:
    """Take from `held` the first image, and then what still fits: up to the first that does not,
    or, not `in_order`, whatever does. The first always goes, so none waits for ever; one over the
    budget goes alone. Errors take no room.
    """
    batch: list[tuple[K, Prepared | Exception]] = []
    left: list[tuple[K, Prepared | Exception]] = []
    room: int | None = None  # None: no image yet
    for entry in held:
        patches = _patches(entry)
        if (patches and room is not None and patches > room) or (left and in_order):
            left.append(entry)
            continue
        if patches:
            room = (budget if room is None else room) - patches
        batch.append(entry)
    held[:] = left
    return batch


def _patches(entry: tuple[Any, Prepared | Exception]) -> int:
    return 0 if isinstance(entry[1], Exception) else entry[1].num_patches
