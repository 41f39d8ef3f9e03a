"""INPUT arguments -> the images they name.

Ids are POSIX paths: of a folder's images relative to that folder, of a file its name. A line of
`@list.txt` is taken relative to the list's own folder; its id is the path relative to that folder
where it lies inside, else the whole path without its leading "/"; ".." in it means what it means to
the system, also behind a link. What a list or an argument names outright is always tried, whatever
its extension. A list is text, one path a line; a byte order mark of UTF-8 and blank lines are no
part of it.
"""

from __future__ import annotations

import codecs
import logging
import os
import stat
from collections.abc import Callable, Container, Iterator, Sequence
from itertools import islice
from pathlib import Path

from vitrt.sources.folder import (
    Choice,
    id_from,
    is_image_name,
    named,
    printable,
    unprintable,
    walk,
    would_be_met,
)
from vitrt.sources.record import Record

__all__ = ["InputError", "Inputs"]

logger = logging.getLogger(__name__)

_PEEK = 50_000  # images looked through for two with one id before anything is written


class InputError(ValueError):
    """An INPUT that cannot be used."""


class Inputs:
    """The images behind the INPUT arguments, listed afresh by every iteration."""

    def __init__(
        self, arguments: Sequence[str | os.PathLike[str]], *, all_files: bool = False
    ) -> None:
        """InputError for an argument that cannot be listed, or for two that give equal ids.

        `all_files` takes every file of a folder for an image, whatever its name.
        """
        self.choice = Choice(all_files)  # with what the last iteration left out
        self._parts = [_part(os.fspath(argument), self.choice) for argument in arguments]
        if not self._parts:
            raise InputError("no INPUT: give a folder, an image file, or @list.txt")
        self._files: dict[str, str] = {}  # id -> path: a shell's * names files by the thousand
        for part in self._parts:
            if isinstance(part, _File):
                _check_id(part.id, part.path, self._files.get(part.id))
                self._files[part.id] = part.path
        if len(self._parts) > 1:
            _check_apart(self._parts, all_files=all_files)
            for _ in islice(self, _PEEK):
                pass

    def __iter__(self) -> Iterator[Record]:
        """Raises InputError on meeting two images with one id."""
        return self._records(lambda: False)

    def until(self, should_stop: Callable[[], bool]) -> Iterator[Record]:
        """The same, ending early once `should_stop`; logs what was left out."""
        yield from self._records(should_stop)
        if self.choice.left_out:
            logger.info("%s", self.choice)

    def check_any(self) -> None:
        """InputError where there is nothing to encode at all."""
        if next(iter(self), None) is None:
            left_out = f": {self.choice}" if self.choice.left_out else ""
            raise InputError(f"the inputs hold no image{left_out}")

    def _records(self, should_stop: Callable[[], bool]) -> Iterator[Record]:
        self.choice.left_out.clear()
        earlier: list[_Folder | _List] = []
        for part in self._parts:
            if isinstance(part, _File):
                yield part.record()
                continue
            for record in part.records(should_stop):
                _check_id(record.id, record.path, self._files.get(record.id))
                for other in earlier:
                    _check_id(record.id, record.path, other.path_of(record.id))
                yield record
            earlier.append(part)


def _part(argument: str, choice: Choice) -> _Folder | _File | _List:
    if argument.startswith("@"):
        return _List(argument[1:])
    if os.path.isdir(argument):
        return _Folder(argument, choice)
    if not os.path.lexists(argument):
        raise InputError(f"INPUT {printable(argument)} does not exist")
    return _File(argument)


def _check_id(image_id: str, path: str, other: str | None) -> None:
    """InputError where there is an `other` path of that id."""
    if other is not None:
        raise InputError(
            f"{printable(other)} and {printable(path)} would both get the id {image_id!r}; "
            "encode them into two folders, or give one folder that holds both"
        )


def _check_apart(parts: Sequence[_Folder | _File | _List], *, all_files: bool) -> None:
    """InputError for a folder or an image in another folder, which would be encoded twice."""
    folders: dict[str, str] = {}  # true path -> as given
    for part in parts:
        if isinstance(part, _Folder):
            real = os.path.realpath(part.path)
            if real in folders:
                raise _shared(part.path, folders[real])
            folders[real] = part.path
    for real, path in folders.items():
        outer = _outer(real, folders)
        if outer is not None:
            raise _shared(path, folders[outer])
    if not folders:
        return
    parents: dict[str, str] = {}  # as given -> true path: looked up once for all files in it
    for part in parts:
        if isinstance(part, _File):
            parent, name = os.path.split(part.path)
            if parent not in parents:
                parents[parent] = os.path.realpath(parent)
            real = os.path.join(parents[parent], name)
            outer = _outer(real, folders)
            if outer is not None and would_be_met(
                os.path.relpath(real, outer), all_files=all_files
            ):
                raise _shared(part.path, folders[outer])


def _outer(path: str, folders: Container[str]) -> str | None:
    """The one of `folders` that `path` lies in."""
    while (parent := os.path.dirname(path)) != path:
        if parent in folders:
            return parent
        path = parent
    return None


def _shared(path: str, other: str) -> InputError:
    return InputError(
        f"INPUT {printable(path)} and INPUT {printable(other)} share files: give only the outer one"
    )


class _File:
    def __init__(self, path: str) -> None:
        self.path = path
        self.id = id_from(os.path.basename(path))

    def record(self) -> Record:
        return named(self.id, self.path)


class _Folder:
    def __init__(self, path: str, choice: Choice) -> None:
        self.path = path
        self._choice = choice
        try:
            os.scandir(path).close()
        except OSError as error:
            raise InputError(
                f"INPUT {printable(path)} cannot be listed: {error.strerror}"
            ) from error

    def records(self, should_stop: Callable[[], bool]) -> Iterator[Record]:
        return walk(self.path, should_stop, self._choice)

    def path_of(self, image_id: str) -> str | None:
        for name in (image_id, unprintable(image_id)):
            if name is not None and (self._choice.all_files or is_image_name(name)):
                path = os.path.join(self.path, name)
                if os.path.isfile(path):
                    return path
        return None


class _List:
    def __init__(self, path: str) -> None:
        self.path = path
        self._folder = os.path.dirname(_without_dots(os.path.join(os.getcwd(), path)))
        self._paths: dict[str, str] | None = None
        try:
            mode = os.stat(path).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # opening a folder says what it is
                raise InputError(
                    f"INPUT list {printable(path)} is not a regular file, and a list is read more "
                    "than once: write it to a file first"
                )
            for _ in islice(self._lines(), _PEEK):
                pass
        except OSError as error:
            raise InputError(
                f"INPUT list {printable(path)} cannot be read: {error.strerror}"
            ) from error

    def records(self, should_stop: Callable[[], bool]) -> Iterator[Record]:
        for image_id, path, is_repeated in self._lines():
            if should_stop():
                return
            if is_repeated:
                logger.warning(
                    "%s names %s more than once; it is encoded once", self.path, image_id
                )
            else:
                yield named(image_id, path)

    def path_of(self, image_id: str) -> str | None:
        if self._paths is None:
            self._paths = {}
            for name, path, _ in self._names():
                self._paths.setdefault(name, path)
        return self._paths.get(image_id)

    def _lines(self) -> Iterator[tuple[str, str, bool]]:
        """Ids, paths as written, and whether an earlier line names the same file.

        Raises InputError on meeting two files with one id.
        """
        # Paths are looked up, and so kept, only once an id comes back: a list may be of millions.
        seen: set[str] = set()
        for image_id, path, written in self._names():
            if image_id not in seen:
                seen.add(image_id)
                yield image_id, written, False
                continue
            other = self.path_of(image_id)
            _check_id(image_id, path, None if other == path else other)
            yield image_id, written, True

    def _names(self) -> Iterator[tuple[str, str, str]]:
        """The id of each line, its path without "..", and its path as written, to be opened."""
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                if number == 1:
                    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                        raise InputError(
                            f"INPUT list {printable(self.path)} is UTF-16; save it as UTF-8"
                        )
                    line = line.removeprefix(codecs.BOM_UTF8)
                if b"\0" in line:
                    raise InputError(
                        f"INPUT list {printable(self.path)} holds a NUL byte in line {number}; "
                        "expected UTF-8 text, one path a line"
                    )
                name = os.fsdecode(line.rstrip(b"\r\n"))
                if name.strip():
                    written = os.path.join(self._folder, name)
                    path = _without_dots(written)
                    inside = os.path.relpath(path, self._folder)
                    outside = inside.split(os.sep, 1)[0] == os.pardir
                    yield id_from(path.lstrip(os.sep) if outside else inside), path, written


def _without_dots(path: str) -> str:
    """An absolute path without "." and "..", that names the same file.

    The ".." behind a link leaves the folder that it leads to: os.path.normpath takes the link out.
    """
    if os.pardir not in path:
        return os.path.normpath(path)
    head, *names = Path(path).parts
    for name in names:
        if name != os.pardir:
            head = os.path.join(head, name)
        else:
            head = os.path.dirname(os.path.realpath(head) if os.path.islink(head) else head)
    return head
