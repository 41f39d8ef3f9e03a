"""File operations that survive a power cut, and one error for all the ways a disk can refuse them.

A file counts as written only when its bytes, then the folder that names it, are flushed to disk.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vitrt.messages import reason_of

FULL = (errno.ENOSPC, errno.EDQUOT)  # the errno of an OutputError for a full disk

_WRITE_BYTES = 64 << 20  # of one call: some systems refuse or cut short 2 GiB and more


class OutputError(OSError):
    """The output folder cannot be written; what was finished before stays valid."""

    def __init__(self, action: str, path: Path, error: OSError) -> None:
        super().__init__(f"cannot {action} {path}: {reason_of(error)}")
        self.errno = error.errno


def make_folder(folder: Path) -> None:
    """Create `folder` and its parents where missing, each flushed into the one above it."""
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    for path in reversed(missing):
        try:
            os.mkdir(path)
        except FileExistsError:
            continue  # another rank was faster
        except OSError as error:
            raise OutputError("create folder", path, error) from error
        flush_folder(path.parent)
    if not folder.is_dir():
        found = NotADirectoryError(errno.ENOTDIR, "a file of that name exists")
        raise OutputError("create folder", folder, found)


def temporary_path(path: Path) -> Path:
    """Where `path` is written before it is renamed; hidden, and recognised as a leftover."""
    return path.with_name(f".{path.name.lstrip('.').split('.')[0]}.tmp")


def partial_path(path: Path) -> Path:
    """Where a file or folder outside of output folders is written, until it is complete."""
    return path.with_name(f".{path.name}.partial")


def write_file(
    path: Path, chunks: Iterable[bytes | memoryview], temporary: Path | None = None
) -> None:
    """Write `chunks` to a temporary file, flush it, and rename it to `path`: all or nothing.

    After an error `path` is as it was, or complete but perhaps not lasting. `temporary` lies beside
    it, by default at `temporary_path`, which is for output folders.
    """
    temporary = temporary or temporary_path(path)
    action, target = "create", temporary
    try:
        with _opened(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as handle:
            action = "write"
            for chunk in chunks:
                _write_all(handle, chunk)
            action = "flush"
            os.fsync(handle)
        action, target = "rename a finished file to", path
        os.replace(temporary, path)
    except OSError as error:
        discard(temporary)
        raise OutputError(action, target, error) from error
    flush_folder(path.parent)


def append(path: Path, data: bytes, *, flush: bool) -> None:
    """Append `data`; where that fails, cut the file back to what it held (OutputError either way).

    The error's attribute `undone` says whether the file is as it was before.
    """
    action, before = "open", None
    try:
        with _opened(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) as handle:
            before = os.fstat(handle).st_size
            action = "write"
            _write_all(handle, data)
            if flush:
                action = "flush"
                os.fsync(handle)
    except OSError as error:
        failure = AppendError(action, path, error)
        failure.undone = before is None or _truncated(path, before)
        raise failure from error


class AppendError(OutputError):
    """Appending failed; `undone` is False where not even the old length could be restored."""

    undone = False


def truncate(path: Path, size: int) -> None:
    """Cut `path` to `size` bytes and flush it."""
    try:
        with _opened(path, os.O_WRONLY) as handle:
            os.ftruncate(handle, size)
            os.fsync(handle)
    except OSError as error:
        raise OutputError("cut", path, error) from error


def remove(path: Path) -> None:
    """Remove `path`; no error where it is gone already. `flush_folder` makes it last."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputError("remove", path, error) from error


def discard(path: Path) -> None:
    """Remove `path` where that is possible: for cleaning up after another error."""
    with suppress(OSError):
        os.unlink(path)


def flush_folder(folder: Path) -> None:
    """Flush the names in `folder` to the disk, on systems and file systems that can."""
    if os.name == "nt":
        return
    try:
        with _opened(folder, os.O_RDONLY | os.O_DIRECTORY) as handle:
            os.fsync(handle)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOTSUP):
            return  # this file system has no such operation
        raise OutputError("flush folder", folder, error) from error


def free_bytes(folder: Path) -> int:
    """What the disk under `folder` still takes."""
    try:
        return shutil.disk_usage(folder).free
    except OSError as error:
        raise OutputError("look at", folder, error) from error


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    handle = os.open(path, flags | os.O_CLOEXEC, 0o644)
    try:
        yield handle
    finally:
        os.close(handle)


def _write_all(handle: int, data: bytes | memoryview) -> None:
    view = memoryview(data).cast("B")
    while len(view):
        view = view[os.write(handle, view[:_WRITE_BYTES]) :]


def _truncated(path: Path, size: int) -> bool:
    try:
        truncate(path, size)
    except OutputError:
        return False
    return True
