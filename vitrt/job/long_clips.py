"""Long clips over the ranks of a run: an idle rank encodes a part of another's clip.

The rank that drew the clip has all of it in the end, and writes it as if it had been alone. A part
travels as a file in the output folder; where a rank leaves one, for whatever reason, the owner
encodes it itself, and so has its error, if it has one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from vitrt.engine.stages import Prepared, Stages
from vitrt.features import ImageFeatures
from vitrt.images.prepared import LazyImage
from vitrt.parallel.shared_parts import Offer, SharedParts, Taken
from vitrt.sources.record import Record
from vitrt.store.content import from_bytes, to_bytes
from vitrt.store.durable import discard, write_file
from vitrt.store.manifest import part_name

logger = logging.getLogger(__name__)

_PARTS_A_RANK = 4  # of a clip: what an owner waits for at its end is one of them
_AHEAD = 2  # parts that a rank has in hand: one on the device, one that is decoded


@dataclass(frozen=True, slots=True)
class ClipPart(Record):
    """Frames of a clip that another rank owns."""

    taken: Taken = field(kw_only=True)
    span: tuple[int, int] = field(kw_only=True)  # of the grid's frames


@dataclass(frozen=True, slots=True)
class _Computed:
    """Takes the place of frames whose features another rank computed."""

    features: ImageFeatures

    def decoded(self) -> _Computed:
        return self

    def split(self, most_patches: int) -> list[_Computed]:
        return [self]


class LongClips:
    """This rank's part of the long clips, its own and others'."""

    def __init__(self, shared: SharedParts, folder: Path, *, pool: bool) -> None:
        """`pool`: features are pooled ones. `folder` is that of the output."""
        self._shared = shared
        self._folder = folder
        self._pool = pool
        self._offers: dict[int, Offer] = {}  # of records without features, by identity
        self._finished = 0  # records
        self._in_hand: set[Taken] = set()  # of other ranks' clips

    def stages(self, stages: Stages[Record]) -> Stages[Record]:
        """`stages`, but of a long clip only the parts are computed that no other rank took."""

        def prepare(record: Record) -> Prepared:
            image = stages.prepare(record)
            if isinstance(image, LazyImage) and not isinstance(record, ClipPart):
                return self._offered(record, image)
            return image

        def run(images: Sequence[Any]) -> list[ImageFeatures]:
            first = images[0]
            return [first.features] if isinstance(first, _Computed) else stages.run(images)

        return replace(stages, prepare=prepare, run=run)

    # The owner of a clip

    def _offered(self, record: Record, clip: LazyImage) -> LazyImage:
        runs = clip.split(clip.num_patches)
        parts = min(len(runs), _PARTS_A_RANK * self._shared.size)
        firsts = [len(runs) * part // parts for part in range(parts + 1)]
        bounds = [min(runs[0].grid_thw[0] * first, clip.grid_thw[0]) for first in firsts]
        offer = self._shared.offer({"record": asdict(record), "bounds": bounds}, parts)
        self._offers[id(record)] = offer

        def in_runs() -> Iterator[Any]:
            for part, (first, stop) in enumerate(pairwise(firsts)):
                if (given := self._given(offer, part)) is None:
                    begun = len(clip.begun)
                    while clip.begun:
                        yield clip.begun.pop()
                    yield from runs[first + begun : stop]
                else:
                    clip.begun.clear()
                    times = clip.rows(*bounds[part : part + 2]).times
                    yield _Computed(replace(given, times=times))

        return replace(clip, in_runs=in_runs)

    def _given(self, offer: Offer, part: int) -> ImageFeatures | None:
        """The features that another rank gave for a part; None where this rank is to encode it."""
        if offer.is_mine(part) or not offer.is_done(part):
            return None
        try:
            return from_bytes((self._folder / part_name(offer.number, part)).read_bytes())
        except (OSError, ValueError) as error:  # of a file system that several hosts share
            logger.warning("encoding again what another rank did of a clip: %s", error)
            return None

    def finished(self, record: Record) -> None:
        """Note that a record has its features, or its error."""
        self._finished += 1
        self._end(id(record))

    def _end(self, clip: int) -> None:
        offer = self._offers.pop(clip, None)
        if offer is not None:
            offer.close()
            for part in range(offer.parts):
                discard(self._folder / part_name(offer.number, part))

    # A rank with nothing else to do

    def parts(self, listed: int) -> Iterator[ClipPart]:
        """Parts of other ranks' clips, once all `listed` records of this one are finished."""
        for taken in self._shared.take_others(
            lambda: self._finished == listed, lambda: len(self._in_hand) < _AHEAD
        ):
            first, stop = taken.item["bounds"][taken.part : taken.part + 2]
            self._in_hand.add(taken)
            try:
                yield ClipPart(**taken.item["record"], taken=taken, span=(first, stop))
            except GeneratorExit:  # nobody takes it any more, perhaps not even `close`
                self._finish(taken, done=False)
                raise

    def give(self, part: ClipPart, features: ImageFeatures) -> None:
        """Hand a part to the clip's owner. OutputError."""
        path = self._folder / part_name(part.taken.offer, part.taken.part)
        write_file(path, [to_bytes(features, pooled=self._pool)])
        logger.debug("encoded frames %d to %d of %s for another rank", *part.span, part.id)
        self._finish(part.taken, done=True)
        if not self._shared.is_wanted(part.taken):  # its owner may not have seen the file
            discard(path)

    def leave(self, part: ClipPart) -> None:
        """Let the owner encode it."""
        self._finish(part.taken, done=False)

    def close(self) -> None:
        """This rank does no more, and leaves what it has in hand."""
        for clip in list(self._offers):
            self._end(clip)
        for taken in list(self._in_hand):
            self._finish(taken, done=False)

    def _finish(self, taken: Taken, *, done: bool) -> None:
        self._shared.finish(taken, done=done)
        self._in_hand.discard(taken)
