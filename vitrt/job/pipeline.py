"""Images from a listing to shards: decoding, the device and writing overlap, in bounded memory.

    list -> decode (threads, in order) -> pack with look-ahead -> device -> host -> write (thread)

Every arrow is a bounded queue. For the same listing and budget the batches are the same in every
run, so results are reproducible. A rank of several runs this over the part of the work it draws.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from vitrt.engine.batching import default_workers
from vitrt.images.processor import PreparedImage
from vitrt.job.decode_ahead import DEFAULT_AHEAD_BYTES, DecodeAhead
from vitrt.job.device_stage import DeviceStage, Encoder, Item, Refused, patches_of
from vitrt.job.progress import Progress
from vitrt.job.write_behind import Skipped, WriteBehind
from vitrt.sources.record import Record
from vitrt.store.encoded_index import EncodedIndex
from vitrt.store.writer import FeatureWriter

logger = logging.getLogger(__name__)

_LOOK_AHEAD = 2  # budgets' worth of decoded images to fill batches from
_MOST_IMAGES = 512  # of them: what each costs beside its pixels adds up where images are tiny


class Processor(Protocol):
    """What decodes: an ImageProcessor."""

    def prepare(self, image: str | bytes, name: str | None = None) -> PreparedImage: ...


class ImageEncoder(Encoder, Protocol):
    """What encodes: a VisionEncoder."""

    @property
    def processor(self) -> Processor: ...


class SkippedImageError(ValueError):
    """An image could not be encoded, and the run was to fail then."""


@dataclass(frozen=True, slots=True)
class PipelineOptions:
    """How to run; nothing here changes what is written for an image."""

    workers: int | None = None  # decoding threads; None: as cores permit
    on_error: Literal["skip", "fail"] = "skip"
    pool: bool = False
    ahead_bytes: int = DEFAULT_AHEAD_BYTES


class Stop:
    """Asks a run to end after what is on the device; may be set from a signal handler."""

    def __init__(self) -> None:
        self.requested = False
        self._asked = False
        self._then: list[Callable[[], None]] = []

    @property
    def heard(self) -> bool:
        """Whether a run listens: before one does, a request waits for it."""
        return bool(self._then)

    def request(self) -> None:
        self._asked = True
        for call in self._then:
            call()
        self.requested = True  # last: whoever ends by it finds the calls made

    def then(self, call: Callable[[], None]) -> None:
        """Have `call` made on a request; at once if there was one."""
        self._then.append(call)
        if self._asked:
            call()


@dataclass(slots=True)
class Outcome:
    """How a run ended."""

    dropped: list[tuple[str, str]]  # (id, shard) of changed sources that could not be encoded again
    interrupted: bool = False


def encode_sources(
    encoder: ImageEncoder,
    sources: Iterable[Record],
    writer: FeatureWriter,
    done: EncodedIndex,
    options: PipelineOptions,
    *,
    progress: Progress,
    stop: Stop,
) -> Outcome:
    """Encode every source that `done` does not hold in its present state.

    On return everything encoded is durable; after an error everything that was encoded before it
    is, where the disk permits. An error also requests `stop`: `sources` that listen to it end.

    Raises:
        OutputError: the disk refused.
        SkippedImageError: the first unusable image, with `on_error="fail"`.
        InputError: from the listing.
    """
    outcome = Outcome(dropped=[])
    behind = WriteBehind(writer, progress, done.shard_of_id, stop.request)

    def skip(source: Record, error_class: str, message: str) -> None:
        logger.warning("skipped: %s", message)
        behind.put(Skipped(source.id, error_class, message))
        old = done.shard_of_id(source.id)
        if old is not None and source.problem is None:
            outcome.dropped.append((source.id, old))
        if options.on_error == "fail":
            raise SkippedImageError(message)

    stage = DeviceStage(encoder, pool=options.pool)
    # Not the encoder: `stop` and `progress` outlive it, and keep what decodes. NCCL cannot be left
    # while there are recorded graphs.
    processor = encoder.processor
    decoding = DecodeAhead(
        _not_done(sources, done, progress, stop),
        lambda source: processor.prepare(source.load(), name=source.id),
        workers=options.workers or default_workers(),
        max_bytes=options.ahead_bytes,
    )
    stop.then(decoding.stop)
    progress.listing = lambda: (decoding.listed, decoding.all_listed)
    progress.queues = lambda: (decoding.waiting, behind.waiting)
    with decoding:
        try:
            for batch in _batches(decoding, stage, skip):
                if stop.requested:
                    break
                for result in stage.encode(batch):
                    if isinstance(result, Refused):
                        skip(result.source, type(result.error).__name__, str(result.error))
                    else:
                        behind.put(result)
        except BaseException:
            stop.request()
            raise
        finally:
            # Also on the way out of an error, and before the listing has ended, which may take a
            # slow disk a while: what was encoded is kept.
            behind.finish()
    outcome.interrupted = stop.requested
    return outcome


def _not_done(
    sources: Iterable[Record], done: EncodedIndex, progress: Progress, stop: Stop
) -> Iterator[Record]:
    for source in sources:
        if stop.requested:
            return
        if source.problem is None and done.holds(source):
            progress.count_resumed()
        else:
            yield source


def _batches(
    decoding: DecodeAhead, stage: DeviceStage, skip: Callable[[Record, str, str], None]
) -> Iterator[list[Item]]:
    """Batches of decoded images; what cannot be decoded goes to `skip`."""
    pending: list[Item] = []
    patches = 0
    for decoded in decoding:
        if decoded.image is None:
            skip(decoded.source, decoded.error_class, decoded.message)
            continue
        pending.append((decoded.source, decoded.image))
        patches += decoded.image.num_patches
        while patches >= _LOOK_AHEAD * stage.budget or len(pending) >= _MOST_IMAGES:
            batch = take_batch(pending, stage.budget)
            patches -= patches_of(batch)
            yield batch
    while pending:
        yield take_batch(pending, stage.budget)


def take_batch(pending: list[Item], budget: int) -> list[Item]:
    """Take from `pending` the oldest image, and then each image, in order, that still fits.

    The oldest always goes, so none waits for ever; one over the budget goes alone.
    """
    room = budget - pending[0][1].num_patches
    batch, left = [pending[0]], []
    for item in pending[1:]:
        _, image = item
        if image.num_patches <= room:
            room -= image.num_patches
            batch.append(item)
        else:
            left.append(item)
    pending[:] = left
    return batch
