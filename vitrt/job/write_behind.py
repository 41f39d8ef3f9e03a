"""Features and errors written by a thread of their own, a few batches behind the device."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeAlias

from vitrt.job.long_clips import ClipPart, LongClips
from vitrt.job.progress import Progress
from vitrt.job.to_host import OnHost, Transfer
from vitrt.sources.record import Record
from vitrt.store.durable import OutputError
from vitrt.store.writer import FeatureWriter, tokens_of

_QUEUED = 2  # batches that wait for the writer: each holds its features on the device or the host


@dataclass(frozen=True, slots=True)
class Encoded:
    """What one forward made."""

    records: list[Record]
    results: list[OnHost]  # pooled ones have one row, float32


@dataclass(frozen=True, slots=True)
class Skipped:
    """An image that is not encoded, and why."""

    id: str
    error_class: str
    message: str


Message: TypeAlias = Encoded | Skipped | None  # None: finish


class WriteBehind:
    """Hands what it is given to a FeatureWriter, in order. The writer's errors surface in `put`."""

    def __init__(
        self,
        writer: FeatureWriter,
        progress: Progress,
        replaced: Callable[[str], str | None],
        on_failure: Callable[[], None],
        clips: LongClips | None = None,
    ) -> None:
        """`replaced` names the shard that holds an older state of an image of that id.

        `on_failure` is called, in the writing thread, as soon as an error waits to surface. Parts
        of other ranks' clips go to `clips`.
        """
        self._clips = clips
        self._writer = writer
        self._progress = progress
        self._replaced = replaced
        self._on_failure = on_failure
        self._queue: queue.Queue[Message] = queue.Queue(_QUEUED)
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="vitrt-write", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Batches not yet taken up."""
        return self._queue.qsize()

    def finish(self) -> None:
        """Write everything, the shard in hand as well, and return when it is durable."""
        self.put(None)
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def put(self, message: Message) -> None:
        """Wait for room, then queue. Raises what the writer raised."""
        while True:
            if self._failure is not None:
                raise self._failure
            try:
                return self._queue.put(message, timeout=0.2)
            except queue.Full:
                continue

    def _run(self) -> None:
        try:
            while (message := self._queue.get()) is not None:
                if isinstance(message, Skipped):
                    self._writer.add_error(message.id, message.error_class, message.message)
                    self._progress.count_skipped()
                else:
                    self._write(message)
            self._writer.close()
        except BaseException as error:
            if not isinstance(error, OutputError):
                with suppress(Exception):  # `error` is what matters
                    self._writer.flush()  # what was encoded before it
            self._writer.wait()  # nothing writes on after `finish`
            self._failure = error
            self._on_failure()

    def _write(self, encoded: Encoded) -> None:
        images = replaced = tokens = 0
        transfers: dict[int, Transfer] = {}
        for record, result in zip(encoded.records, encoded.results, strict=True):
            features = result.wait()
            transfers |= {id(transfer): transfer for transfer in result.transfers}
            if self._clips is not None and isinstance(record, ClipPart):
                self._clips.give(record, features)
                continue
            images += 1
            tokens += tokens_of(features)
            old = self._replaced(record.id)
            self._writer.add(record, features, replaces=old)
            replaced += old is not None
        seconds = sum(transfer.seconds for transfer in transfers.values())
        self._progress.count_batch(images, tokens, seconds, replaced=replaced)
