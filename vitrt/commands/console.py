"""What commands have in common at a terminal: exit codes, log lines and Ctrl-C."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from vitrt.job.pipeline import Stop
from vitrt.job.progress import json_line, write_json

# Exit codes.
OK, FAILED, SKIPPED, INTERRUPTED = 0, 1, 3, 130


@contextmanager
def graceful_interrupts(stop: Stop, *, as_json: bool = False) -> Iterator[None]:
    """The first Ctrl-C (or SIGTERM) ends the run after the shard in hand, a second one at once.

    Before a run listens to `stop`, already the first one raises KeyboardInterrupt.
    """
    signals = 0

    def handle(number: int, frame: object) -> None:
        nonlocal signals
        signals += 1
        if signals > 1:
            os._exit(INTERRUPTED)  # as safe as kill -9, which loses the shard in hand at most
        if not stop.heard:
            raise KeyboardInterrupt
        stop.request()
        text = "interrupted: finishing the shard in hand; again to stop at once"
        event: dict[str, object] = {"level": "warning", "message": text}
        line = json_line("log", event) if as_json else f"\n{text}\n"
        os.write(2, line.encode())  # not by logging, whose lock the interrupted code may hold

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, handle) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def set_up_logging(*, verbose: bool, as_json: bool) -> None:
    """Send the log of this process, Python's warnings included, to standard error."""
    root = logging.getLogger()
    root.handlers[:] = [_Handler(as_json=as_json)]
    root.setLevel(logging.WARNING)
    logging.getLogger("vitrt").setLevel(logging.DEBUG if verbose else logging.INFO)
    logging.captureWarnings(capture=True)


class _Handler(logging.Handler):
    """Standard error, above a progress bar where there is one; or one JSON object a line."""

    def __init__(self, *, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        try:
            text = self.format(record)
            if self._as_json:
                write_json("log", {"level": record.levelname.lower(), "message": text})
            else:
                prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
                tqdm.write(prefix + text, file=sys.stderr)
        except Exception:
            self.handleError(record)
