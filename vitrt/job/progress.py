"""How far a run is: counters that its stages share, and what they come to at one moment."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

_SUMMED = ("listed", "resumed", "images", "replaced", "tokens", "skipped", "images_per_second",
           "tokens_per_second", "decoded_waiting", "batches_waiting")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of a run at one moment."""

    seconds: float  # since the start
    listed: int  # images found so far
    all_listed: bool
    resumed: int  # of them, encoded by an earlier run
    images: int  # encoded by this one
    replaced: int  # of them, in place of features whose file had changed
    tokens: int  # merged ones
    skipped: int
    images_per_second: float
    tokens_per_second: float
    busy_share: float  # of the time, that the device was computing
    decoded_waiting: int  # images between decoding and the device
    batches_waiting: int  # batches between the device and the disk
    seconds_left: float | None  # None while the folder is still being listed

    @classmethod
    def total(cls, states: Sequence[Mapping[str, Any]], ranks: int) -> Snapshot:
        """The state of all `ranks`, out of those that have told theirs, the first rank's first."""
        first = cls(**states[0])
        sums = {name: sum(state[name] for state in states) for name in _SUMMED}
        all_listed = len(states) == ranks and all(state["all_listed"] for state in states)
        worked = sums["images"] + sums["skipped"]
        waiting = sums["listed"] - sums["resumed"] - worked
        left = _seconds_left(waiting, worked, first.seconds) if all_listed else None
        busy = sum(state["busy_share"] for state in states) / len(states)
        return replace(
            first, **sums, all_listed=all_listed, busy_share=round(busy, 4), seconds_left=left
        )

    def text(self) -> str:
        """One line for people."""
        total = f"{self.listed}" if self.all_listed else f"{self.listed}+"
        done = self.images + self.skipped + self.resumed
        left = "?" if self.seconds_left is None else duration(self.seconds_left)
        return (
            f"{done}/{total} images, {self.images_per_second:.1f} images/s, "
            f"{self.tokens_per_second:.0f} tokens/s, device busy {self.busy_share:.0%}, "
            f"queued {self.decoded_waiting} images + {self.batches_waiting} batches, "
            f"skipped {self.skipped}, left {left}"
        )


class Progress:
    """Counters that the stages of a pipeline share."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.listing: Callable[[], tuple[int, bool]] = lambda: (0, False)
        self.queues: Callable[[], tuple[int, int]] = lambda: (0, 0)
        self._lock = threading.Lock()
        self._images = self._tokens = self._skipped = self._resumed = self._replaced = 0
        self._busy = 0.0

    def restart(self) -> None:
        """Count time from here: what came before was loading."""
        self.started = time.perf_counter()

    def count_batch(
        self, images: int, tokens: int, busy_seconds: float, *, replaced: int = 0
    ) -> None:
        with self._lock:
            self._images += images
            self._replaced += replaced
            self._tokens += tokens
            self._busy += busy_seconds

    def count_skipped(self) -> None:
        with self._lock:
            self._skipped += 1

    def count_resumed(self) -> None:
        with self._lock:
            self._resumed += 1

    def snapshot(self) -> Snapshot:
        listed, all_listed = self.listing()
        decoded, batches = self.queues()
        with self._lock:
            seconds = max(time.perf_counter() - self.started, 1e-9)
            worked = self._images + self._skipped
            left = _seconds_left(listed - worked, worked, seconds) if all_listed else None
            return Snapshot(
                seconds=round(seconds, 3),
                listed=listed + self._resumed,
                all_listed=all_listed,
                resumed=self._resumed,
                images=self._images,
                replaced=self._replaced,
                tokens=self._tokens,
                skipped=self._skipped,
                images_per_second=round(self._images / seconds, 3),
                tokens_per_second=round(self._tokens / seconds, 1),
                busy_share=round(min(self._busy / seconds, 1.0), 4),
                decoded_waiting=decoded,
                batches_waiting=batches,
                seconds_left=left,
            )


def _seconds_left(waiting: int, worked: int, seconds: float) -> float | None:
    """None where nothing says how long an image takes."""
    if waiting > 0 and not worked:
        return None
    return round(max(waiting, 0) * seconds / max(worked, 1), 1)


def duration(seconds: float) -> str:
    """h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
