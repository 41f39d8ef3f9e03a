"""How far a run is: a bar on a terminal, a plain line every few seconds elsewhere, or JSON."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal, TextIO

from tqdm import tqdm

logger = logging.getLogger(__name__)

Style = Literal["auto", "bar", "lines", "json", "none"]
_BAR_SECONDS = 0.5
_LINE_SECONDS = 5.0


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
            left = None
            if all_listed and (worked or not listed):
                left = max(listed - worked, 0) * seconds / max(worked, 1)
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
                seconds_left=None if left is None else round(left, 1),
            )


class ProgressDisplay:
    """Shows a Progress from a thread of its own while a run lasts. A context manager.

    Nothing that is wrong with standard error ends the run.
    """

    def __init__(self, progress: Progress, style: Style = "auto") -> None:
        if style == "auto":
            style = "bar" if sys.stderr is not None and sys.stderr.isatty() else "lines"
        self._progress = progress
        self._style = style
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
        if self._style != "none":
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        if self._style != "none":
            self._thread.join()
            if self._progress.snapshot().listed:
                self._show()
        if self._bar is not None:
            self._bar.close()

    def _run(self) -> None:
        interval = _BAR_SECONDS if self._style == "bar" else _LINE_SECONDS
        while not self._ended.wait(interval):
            self._show()

    def _show(self) -> None:
        snapshot = self._progress.snapshot()
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
