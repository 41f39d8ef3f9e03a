"""What commands have in common at a terminal: exit codes, log lines and Ctrl-C."""

from __future__ import annotations

import argparse
import io
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, NoReturn, TextIO

from vitrt.messages import one_line

if TYPE_CHECKING:
    from vitrt.job.stop import Stop

# Exit codes.
OK, FAILED, SKIPPED, INTERRUPTED = 0, 1, 3, 130

_ONE_INTERRUPT = 2.0  # seconds within which further signals belong to the first one


class Parser(argparse.ArgumentParser):
    """argparse with this command's exit code for a wrong command line."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(FAILED, f"{self.prog}: error: {message}\n")


@contextmanager
def graceful_interrupts(stop: Stop, *, as_json: bool = False) -> Iterator[None]:
    """The first Ctrl-C (or SIGTERM) ends the run after the shard in hand, a later one at once.

    What follows the first within two seconds is part of it: torchrun passes on the signal that a
    terminal or a scheduler has sent to its ranks as well. Before a run listens to `stop`, already
    the first one raises KeyboardInterrupt.
    """
    # Not in the handler, which interrupts any code.
    from vitrt.job.progress_display import json_line

    first: float | None = None

    def handle(number: int, frame: object) -> None:
        nonlocal first
        if first is not None:
            if time.monotonic() - first >= _ONE_INTERRUPT:
                os._exit(INTERRUPTED)  # as safe as kill -9, which loses the shard in hand at most
            return
        first = time.monotonic()
        if not stop.heard:
            raise KeyboardInterrupt
        stop.request()
        text = "interrupted: finishing the shard in hand; again in a few seconds to stop at once"
        event: dict[str, object] = {"level": "warning", "message": text}
        line = json_line("log", event) if as_json else f"\n{text}\n"
        with suppress(OSError):
            os.write(2, line.encode())  # not by logging, whose lock the interrupted code may hold

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, handle) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@contextmanager
def held_interrupts() -> Iterator[None]:
    """A Ctrl-C that comes inside the block is handled after it; an error of the block comes first.

    For imports of NumPy. Its C code, and torch's C code that imports it, take an interrupt for a
    missing module: it would be lost, or end in an ImportError.
    """
    before = signal.getsignal(signal.SIGINT)
    if not callable(before) or threading.current_thread() is not threading.main_thread():
        yield  # it is ignored, or comes to another thread
        return
    came: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        before(*came[0])


def prepare_streams() -> None:
    """Have standard streams that take any text.

    Where one was closed before the start comes the null device: otherwise a file that is opened
    later, a shard say, gets the number that messages go to. What standard output cannot encode, a
    path of other bytes say, it shows as escapes: the command that prints it has done its work.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            null = os.fdopen(os.open(os.devnull, os.O_RDWR), mode, errors="backslashreplace")
            setattr(sys, name, null)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def say_last(text: str) -> None:
    """Print the closing line of a command: its work is done, whether or not that can be read."""
    with suppress(OSError):
        sys.stdout.write(text + "\n")
    let_go(sys.stdout)


def let_go(stream: TextIO) -> None:
    """Flush for the last time. What nobody takes is dropped: Python would exit with 120 for it."""
    try:
        stream.flush()
    except OSError:
        with suppress(OSError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)


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
                from vitrt.job.progress_display import write_json

                write_json("log", {"level": record.levelname.lower(), "message": text})
            else:
                prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
                text = "\n".join(map(one_line, text.split("\n")))
                tqdm.write(prefix + text, file=sys.stderr)
        except OSError:
            pass  # nobody reads it
        except Exception:
            self.handleError(record)
