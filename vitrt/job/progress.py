"""How far a run is: a bar on a terminal, a plain line every few seconds elsewhere, or JSON."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TextIO

from tqdm import tqdm

logger = logging.getLogger(__name__)

Style = Literal["auto", "bar", "lines", "json", "none"]
_BAR_SECONDS = 0.5
_LINE_SECONDS = 5.0
_TELL_SECONDS = 1.0  # from one word of a rank to the one that speaks for all, to the next
_SUMMED = ("listed", "resumed", "images", "replaced", "tokens", "skipped", "images_per_second",
           "tokens_per_second", "decoded_waiting", "batches_waiting")  # fmt: skip

Told = Callable[[Mapping[str, Any]], Sequence[Mapping[str, Any]]]


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
        """Of all `ranks`, by what those said that have said anything, the first of them first."""
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


class ProgressDisplay:
    """Shows a Progress from a thread of its own while a run lasts. A context manager.

    Of several `ranks` each is to have one: they tell each other how far they are by `tell`, and
    those whose style is not "none" show all together. Nothing that is wrong with standard error,
    or with telling, ends the run.
    """

    def __init__(
        self, progress: Progress, style: Style = "auto", tell: Told | None = None, ranks: int = 1
    ) -> None:
        if style == "auto":
            style = "bar" if sys.stderr is not None and sys.stderr.isatty() else "lines"
        self._progress = progress
        self._style = style
        self._tell = tell
        self._ranks = ranks
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="vitrt-progress", daemon=True)
        self._bar: tqdm[None] | None = None

    def __enter__(self) -> ProgressDisplay:
        if self._style == "bar":
            self._bar = tqdm(
                unit="image",
                file=_Unfailing(sys.stderr),
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}%|{bar}| {desc}",
            )
        if self._has_thread:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        if self._has_thread:
            self._thread.join()
            if self._progress.snapshot().listed:
                self._show()
        if self._bar is not None:
            self._bar.close()

    @property
    def _has_thread(self) -> bool:
        return self._style != "none" or self._tell is not None

    def _run(self) -> None:
        interval = {"bar": _BAR_SECONDS, "none": _TELL_SECONDS}.get(self._style, _LINE_SECONDS)
        while not self._ended.wait(interval):
            self._show()

    def _snapshot(self) -> Snapshot:
        own = self._progress.snapshot()
        if self._tell is None:
            return own
        try:
            return Snapshot.total(self._tell(asdict(own)), self._ranks)
        except Exception:  # of a network; that a rank is gone, its watchdog says
            logger.debug("other ranks are not heard of", exc_info=True)
            return own

    def _show(self) -> None:
        snapshot = self._snapshot()
        if self._style == "none":
            return
        if self._bar is not None:
            self._bar.total = snapshot.listed or None
            self._bar.n = snapshot.images + snapshot.skipped + snapshot.resumed
            self._bar.set_description_str(snapshot.text())
        elif self._style == "json":
            write_json("progress", asdict(snapshot))
        else:
            _write(snapshot.text() + "\n")


class _Unfailing:
    """A stream that never raises: tqdm would then keep its lock, which log lines wait for."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with suppress(OSError):
            self._stream.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __eq__(self, other: object) -> bool:  # tqdm moves its bar for what goes to the same stream
        return other is self or other is self._stream

    def __hash__(self) -> int:
        return hash(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def write_json(event: str, values: dict[str, object]) -> None:
    """One JSON object on a line of standard error: what `--log-json` gives machines."""
    _write(json_line(event, values))


def _write(line: str) -> None:
    """To standard error, if anybody reads it."""
    if sys.stderr is not None:
        with suppress(OSError):
            sys.stderr.write(line)
            sys.stderr.flush()


def json_line(event: str, values: dict[str, object]) -> str:
    """What `write_json` writes."""
    return json.dumps({"event": event, "time": time.time(), **values}) + "\n"


def duration(seconds: float) -> str:
    """h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
