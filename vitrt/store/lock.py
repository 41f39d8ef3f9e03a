"""One job at a time in an output folder.

The lock is the operating system's (through `filelock`), so it ends with its process, however that
ends. Each rank holds one of its own; the first rank also makes sure that no rank of another job
holds any.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import time
from pathlib import Path

from filelock import FileLock, Timeout

from vitrt.store.durable import OutputError, discard

logger = logging.getLogger(__name__)

LOCK_NAME = re.compile(r"\.lock-(\d{5})")
_PROBED = 0.5  # seconds to wait: `running_job` holds a lock for a moment


class FolderBusyError(ValueError):
    """Another job is writing into the folder."""


class FolderLock:
    """Held from construction to `release`. FolderBusyError names the job that holds it now."""

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self._folder = folder
        self._path = folder / f".lock-{rank:05}"
        self._lock = _take(self._path, _PROBED)
        if rank == 0:
            try:
                for other in sorted(folder.iterdir()):
                    if LOCK_NAME.fullmatch(other.name) and other != self._path:
                        _take(other, _PROBED).release()
            except BaseException:
                self._lock.release()
                raise
        self._leave_note()

    def _leave_note(self) -> None:
        """Leave a note from which others learn who holds the folder."""
        note = _note(self._path)
        if note.exists():
            logger.info(
                "the job that held %s before (%s) ended without releasing it; its lock is stale",
                self._folder,
                _read_note(note),
            )
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
        try:
            note.write_text(json.dumps(holder))
        except OSError as error:
            self._lock.release()
            raise OutputError("write", note, error) from error

    def release(self) -> None:
        discard(_note(self._path))
        self._lock.release()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


def running_job(folder: Path) -> str | None:
    """Which job writes into the folder now; None where there is none, or no telling."""
    for path in sorted(folder.iterdir()):
        if LOCK_NAME.fullmatch(path.name):
            try:
                _take(path).release()
            except FolderBusyError:
                return _read_note(_note(path))
            except (OutputError, NotImplementedError):
                continue  # somebody else's folder, or a file system without locks
    return None


def _take(path: Path, patience: float = 0.0) -> FileLock:
    """The lock, waited for so many seconds at most."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=patience)
    except Timeout:
        raise FolderBusyError(
            f"another job ({_read_note(_note(path))}) is writing into {path.parent}; "
            "wait for it to end, or choose another --output"
        ) from None
    except OSError as error:
        raise OutputError("lock", path, error) from error
    return lock


def _note(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _read_note(path: Path) -> str:
    try:
        holder = json.loads(path.read_text())
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["since"]))
        return f"process {holder['pid']} on {holder['host']}, since {since}"
    except (OSError, ValueError, KeyError, TypeError):
        return "an unknown process"
