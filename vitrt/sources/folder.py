"""The images below a folder, one after the other, however large it is.

Walks follow links (except back into a folder they are in), skip hidden files and folders, and take
files by their extension, or all of them. A byte of a path that is not UTF-8 becomes \\xNN in the
id; of such a path alone, a backslash becomes two.
"""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from itertools import islice, takewhile

from vitrt.messages import counted, reason_of, shorten
from vitrt.sources.record import Record

IMAGE_EXTENSIONS = frozenset(
    f".{name}"
    for name in (
        *("jpg", "jpeg", "jpe", "jfif", "png", "apng", "webp", "gif", "bmp", "dib", "tif", "tiff"),
        *("ppm", "pgm", "pbm", "pnm", "jp2", "j2k", "jpx", "avif", "heic", "heif", "tga", "ico"),
    )
)
VIDEO_EXTENSIONS = frozenset(
    f".{name}"
    for name in (
        *("mp4", "m4v", "mov", "mkv", "webm", "avi", "mpg", "mpeg", "ts", "m2ts", "wmv", "flv"),
        *("3gp", "ogv"),
    )
)
_KINDS_NAMED = 6
_LONGEST_SHOWN = 1000
_SORTED_NAMES = 10_000  # a folder's names are sorted this many at a time
_ESCAPE = re.compile(rb"\\(?:\\|x([0-9a-f]{2}))")


@dataclass(slots=True)
class FileFilter:
    """Tells which files of a folder or an archive are images, and counts what it left out."""

    all_files: bool = False  # every one, whatever its name
    left_out: Counter[str] = field(default_factory=Counter)  # suffix -> files

    def is_image(self, name: str) -> bool:
        """Whether a file of this name is tried."""
        return self.all_files or is_image_name(name)

    def takes(self, name: str) -> bool:
        """Whether a file of this name is tried; those that are not are counted."""
        if self.is_image(name):
            return True
        self.left_out[os.path.splitext(name)[1].lower()] += 1
        return False

    def __str__(self) -> str:
        kinds = [
            f"{count} {suffix or 'with none'}" for suffix, count in self.left_out.most_common()
        ]
        total = self.left_out.total()
        more = "" if len(kinds) <= _KINDS_NAMED else f" and {len(kinds) - _KINDS_NAMED} other kinds"
        return (
            f"{counted(total, 'file')} left out by {'its' if total == 1 else 'their'} suffix "
            f"({', '.join(kinds[:_KINDS_NAMED])}{more}; --all-files tries them)"
        )


@dataclass(slots=True)
class _Level:
    """A folder on the way down."""

    prefix: str  # of the ids in it
    path: str
    key: tuple[int, int]  # device and inode
    entries: Iterator[os.DirEntry[str]]
    chunk: list[os.DirEntry[str]] = field(default_factory=list)
    images: int = 0  # found in it and below


def walk(
    root: str,
    should_stop: Callable[[], bool] = lambda: False,
    file_filter: FileFilter | None = None,
) -> Iterator[Record]:
    """The images of a folder and of the folders in it: sorted, files before folders.

    Ends early once `should_stop`, even where there is no image for long.
    """
    file_filter = file_filter or FileFilter()
    stack = [_open_level("", root)]
    while stack and not should_stop():
        level = stack[-1]
        if not level.chunk:
            try:
                entries = islice(level.entries, _SORTED_NAMES)
                names = list(takewhile(lambda entry: not should_stop(), entries))
            except OSError as error:
                names = []
                yield _unlisted(level.prefix[:-1] or ".", level.path, error)
            if should_stop():
                return
            level.chunk = sorted(names, key=_files_first, reverse=True)
            if not level.chunk:
                stack.pop()
                yield from _close_level(level, stack)
                continue
        entry = level.chunk.pop()
        if entry.name.startswith("."):
            continue
        name = level.prefix + entry.name
        if not _is_folder(entry):
            if file_filter.takes(entry.name):
                level.images += 1
                yield _checked(root, named(id_from(name), entry.path))
            continue
        try:
            inner = _open_level(name + "/", entry.path)
        except OSError as error:
            level.images += 1
            yield _unlisted(name, entry.path, error)
            continue
        if inner.key not in {outer.key for outer in stack}:
            stack.append(inner)


def _open_level(prefix: str, path: str) -> _Level:
    status = os.stat(path)
    return _Level(prefix, path, (status.st_dev, status.st_ino), os.scandir(path))


def _close_level(level: _Level, stack: Sequence[_Level]) -> Iterator[Record]:
    if not stack:
        return
    if not level.images and is_image_name(level.path):
        # Somebody expects a picture there.
        level.images = 1
        yield Record(
            id_from(level.prefix[:-1]), level.path, problem="it is a folder, with no image in it"
        )
    stack[-1].images += level.images


def _files_first(entry: os.DirEntry[str]) -> tuple[bool, str]:
    return _is_folder(entry), entry.name


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads round in a circle
        return False


def _unlisted(name: str, path: str, error: OSError) -> Record:
    problem = f"the folder cannot be listed: {reason_of(error)}"
    return Record(id_from(name), path, problem=problem)


def would_be_met(relative: str, *, all_files: bool = False) -> bool:
    """Whether a walk takes the file of this path below its root."""
    hidden = any(name.startswith(".") for name in relative.split(os.sep))
    return not hidden and (all_files or is_image_name(relative))


def is_image_name(name: str) -> bool:
    """Whether its suffix is that of an image, or of a video where PyAV is there to read it."""
    suffix = os.path.splitext(name)[1].lower()
    return suffix in IMAGE_EXTENSIONS or (is_video_name(name) and _reads_videos())


def is_video_name(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in VIDEO_EXTENSIONS


@cache
def _reads_videos() -> bool:
    return find_spec("av") is not None


def named(image_id: str, path: str) -> Record:
    """The record of a file; `problem` says where it cannot be an image."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        return Record(image_id, path, problem=f"cannot be read: {reason_of(error)}")
    if stat.S_ISDIR(status.st_mode):
        return Record(image_id, path, problem="it is a folder")
    if not stat.S_ISREG(status.st_mode):
        return Record(image_id, path, problem="it is not a regular file")
    return Record(image_id, path, status.st_size, status.st_mtime)


def _checked(root: str, record: Record) -> Record:
    """The record, with a problem where its escaped id is another file's true name."""
    if "\\x" in record.id and os.path.lexists(os.path.join(root, record.id)):
        relative = os.path.relpath(record.path, root)
        if printable(relative) != relative:
            reason = "its name is not UTF-8, and written as such it is the name of another file"
            return Record(record.id + " (not UTF-8)", record.path, problem=reason)
    return record


def id_from(path: str) -> str:
    """A path as an id: POSIX, UTF-8."""
    if os.sep != "/":
        path = path.replace(os.sep, "/")
    return printable(path)


def printable(path: str) -> str:
    """A path with every byte that is not UTF-8 written as \\xNN, and then each backslash as two."""
    raw = os.fsencode(path)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.replace(b"\\", rb"\\").decode("utf-8", "backslashreplace")


def shown(path: str) -> str:
    """A path, URL or id as messages show it: one so long that it is content, by its two ends."""
    return shorten(printable(path), _LONGEST_SHOWN)


def unprintable(text: str) -> str | None:
    """The path with bytes that are not UTF-8 of which `printable` makes `text`, if there is one."""
    if "\\x" not in text:
        return None
    raw = _ESCAPE.sub(lambda m: bytes.fromhex(m[1].decode()) if m[1] else b"\\", text.encode())
    path = os.fsdecode(raw)
    return path if path != text and printable(path) == text else None
