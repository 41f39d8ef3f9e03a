"""Progress shown: a bar on a terminal, a plain line every few seconds elsewhere, or JSON lines."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal, TextIO

from tqdm import tqdm

from vitrt.job.progress import Progress, Snapshot

if TYPE_CHECKING:
    from vitrt.job.ranks import Ranks

logger = logging.getLogger(__name__)

Style = Literal["auto", "bar", "lines", "json", "none"]
_BAR_SECONDS = 0.5
_LINE_SECONDS = 5.0
_TELL_SECONDS = 1.0  # between the reports of a rank that shows nothing


class ProgressDisplay:
    """Shows a Progress from a thread of its own while a run lasts. A context manager.

    Of several `ranks` each is to have one: they tell each other how far they are, and those whose
    style is not "none" show all together. Nothing that is wrong with standard error, or with
    telling, ends the run.
    """

    def __init__(
        self, progress: Progress, style: Style = "auto", ranks: Ranks | None = None
    ) -> None:
        if style == "auto":
            style = "bar" if sys.stderr is not None and sys.stderr.isatty() else "lines"
        self._progress = progress
        self._style = style
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
            last = self._snapshot()
            if last.listed:
                self._show(last)
        if self._bar is not None:
            self._bar.close()

    @property
    def _has_thread(self) -> bool:
        return self._style != "none" or self._ranks is not None

    def _run(self) -> None:
        interval = {"bar": _BAR_SECONDS, "none": _TELL_SECONDS}.get(self._style, _LINE_SECONDS)
        while not self._ended.wait(interval):
            self._show(self._snapshot())

    def _snapshot(self) -> Snapshot:
        own = self._progress.snapshot()
        if self._ranks is None:
            return own
        try:
            return Snapshot.total(self._ranks.tell(asdict(own)), self._ranks.size)
        except Exception:  # of a network; that a rank is gone, its watchdog says
            logger.debug("other ranks are not heard of", exc_info=True)
            return own

    def _show(self, snapshot: Snapshot) -> None:
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
