"""Images from a listing to shards: decoding, the device and writing overlap, in bounded memory.

    list (thread) -> pipeline -> host -> write (thread)

The same listing and budget give the same batches in every run, so results are reproducible. Of
several ranks, each runs this over its part of the work.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from vitrt.cores import default_workers
from vitrt.engine.pipeline import Pipeline
from vitrt.engine.stages import Prepared, Stages
from vitrt.images.inputs import ImageError
from vitrt.job.listing import Listing
from vitrt.job.long_clips import ClipPart, LongClips
from vitrt.job.progress import Progress
from vitrt.job.stop import Stop
from vitrt.job.to_host import OnHost, ToHost
from vitrt.job.write_behind import Encoded, Skipped, WriteBehind
from vitrt.sources.folder import shown
from vitrt.sources.record import Record
from vitrt.store.encoded_index import EncodedIndex
from vitrt.store.writer import FeatureWriter

logger = logging.getLogger(__name__)

_AHEAD_PER_WORKER = 8
_MIN_AHEAD = 64


class SkippedImageError(ValueError):
    """An image could not be encoded, and the run was to fail then."""


@dataclass(slots=True)
class Outcome:
    """How a run ended."""

    # (id, shard) of changed images that could not be encoded again
    dropped: list[tuple[str, str]] = field(default_factory=list)
    interrupted: bool = False

    def drop(self, record: Record, encoded: EncodedIndex) -> None:
        """An image could not be encoded: its older features, if there are any, are to go."""
        old = encoded.shard_of_id(record.id)
        if old is not None and record.problem is None:
            self.dropped.append((record.id, old))


def encode_records(
    stages: Stages[Record],
    records: Iterable[Record],
    writer: FeatureWriter,
    encoded: EncodedIndex,
    *,
    progress: Progress,
    stop: Stop,
    workers: int | None = None,
    on_error: Literal["skip", "fail"] = "skip",
    clips: LongClips | None = None,
    turn: AbstractContextManager[object] | None = None,
) -> Outcome:
    """Encode every record that `encoded` does not hold in its present state.

    On return everything encoded is durable; after an error everything that was encoded before it
    is, where the disk permits. An error also requests `stop`: `records` that listen to it end.
    `clips` are those that ranks share. `turn` is held while batches are launched, and neither
    while the first images are prepared nor while the last features are written.

    Raises:
        OutputError: the disk refused.
        SkippedImageError: the first unusable image, with `on_error="fail"`.
        InputError: from the listing.
    """
    outcome = Outcome()
    behind = WriteBehind(writer, progress, encoded.shard_of_id, stop.request, clips)
    pipeline = _pipeline(clips.stages(stages) if clips else stages, workers or default_workers())
    # Not the pipeline: `stop` and `progress` outlive the encoder, and NCCL cannot be left while
    # there are recorded graphs.
    window = pipeline.window
    listed = _not_encoded(records, encoded, progress, stop)
    listing = Listing(listed, window, clips.parts) if clips else Listing(listed, window)
    stop.then(window.stop)
    progress.listing = lambda: (listing.listed, listing.all_listed)
    progress.queues = lambda: (window.waiting, behind.waiting)
    with listing, pipeline:
        try:
            with turn or nullcontext():
                for part in pipeline.parts():
                    for record, error in _write(part, behind, clips):
                        message = _skip(record, error, behind)
                        outcome.drop(record, encoded)
                        if on_error == "fail":
                            raise SkippedImageError(message)
                        logger.warning("skipped: %s", message)
        except BaseException:
            stop.request()
            raise
        finally:
            # Also on the way out of an error, and before the listing has ended, which may take a
            # slow disk a while: what was encoded is kept.
            try:
                behind.finish()
            finally:
                if clips:
                    clips.close()
    outcome.interrupted = stop.requested
    return outcome


def _pipeline(stages: Stages[Record], workers: int) -> Pipeline[Record, Record, OnHost]:
    to_host = ToHost(stages)
    return Pipeline(
        stages,
        to_host,
        join=to_host.join,
        workers=workers,
        in_order=False,
        ahead=max(_AHEAD_PER_WORKER * workers, _MIN_AHEAD),
    )


def prepare_with(
    prepare: Callable[..., Prepared], *, shared: bool = False
) -> Callable[[Record], Prepared]:
    """What an image processor's `prepare` makes of a record; `shared` as that takes it."""
    whole = partial(prepare, shared=True) if shared else prepare

    def prepare_record(record: Record) -> Prepared:
        if record.problem is not None:
            raise ImageError(f"{record.id}: {record.problem}")
        if isinstance(record, ClipPart):
            return prepare(record.load(), name=record.id, span=record.span)
        return whole(record.load(), name=record.id)

    return prepare_record


def _not_encoded(
    records: Iterable[Record], encoded: EncodedIndex, progress: Progress, stop: Stop
) -> Iterator[Record]:
    for record in records:
        if stop.requested:
            return
        if record.problem is None and encoded.holds(record):
            progress.count_resumed()
        else:
            yield record


def _write(
    part: list[tuple[Record, OnHost | Exception]], behind: WriteBehind, clips: LongClips | None
) -> list[tuple[Record, Exception]]:
    """Hand what was encoded to the writer; returns the records that failed, with their errors."""
    records, results, failed = [], [], []
    for record, result in part:
        if clips and isinstance(record, ClipPart):
            if isinstance(result, Exception):
                logger.debug("%s: left to its owner", record.id, exc_info=result)
                clips.leave(record)
                continue
        elif clips:
            clips.finished(record)
        if isinstance(result, Exception):
            failed.append((record, result))
        else:
            records.append(record)
            results.append(result)
    if records:
        behind.put(Encoded(records, results))
    return failed


def _skip(record: Record, error: Exception, behind: WriteBehind) -> str:
    """Record that an image has no features; returns why."""
    if not isinstance(error, ValueError):
        logger.debug("unexpected error from %s", record.id, exc_info=error)
    name = shown(record.id)
    message = (str(error) or type(error).__name__).replace(record.id, name)
    if name not in message:
        message = f"{name}: {message}"
    behind.put(Skipped(record.id, type(error).__name__, message))
    return message
