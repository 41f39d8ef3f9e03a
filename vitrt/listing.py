"""INPUT arguments -> the images they name, one after the other: a folder of any size is never
listed as a whole.

Ids are POSIX paths: of a folder's images relative to that folder, of a file its name. A line of
`@list.txt` is taken relative to the list's own folder; its id is the path relative to that folder
where it lies inside, else the whole path without its leading "/". A byte of a name that is not
UTF-8 becomes \\xNN in the id.

Folder walks follow links (except back into a folder they are in), skip hidden files and folders,
and take files by their extension. What a list or an argument names outright is always tried.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS = frozenset(
    f".{name}"
    for name in (
        *("jpg", "jpeg", "jpe", "jfif", "png", "apng", "webp", "gif", "bmp", "dib", "tif", "tiff"),
        *("ppm", "pgm", "pbm", "pnm", "jp2", "j2k", "jpx", "avif", "heic", "heif", "tga", "ico"),
    )
)
_SORTED_NAMES = 10_000  # a folder's names are sorted this many at a time
_PEEK = 50_000  # images looked through for two with one id before anything is written


class InputError(ValueError):
    """An INPUT that cannot be used."""


@dataclass(frozen=True, slots=True)
class Source:
    """One image to encode."""

    id: str
    path: str
    size: int = 0  # in bytes
    mtime: float = 0.0  # in seconds
    problem: str | None = None  # why it is known to be unusable


@dataclass(slots=True)
class _Level:
    """A folder on the way down."""

    prefix: str  # of the ids in it
    path: str
    key: tuple[int, int]  # device and inode
    entries: Iterator[os.DirEntry[str]]
    chunk: list[os.DirEntry[str]] = field(default_factory=list)
    images: int = 0  # found in it and below


class Inputs:
    """The images behind the INPUT arguments. Iterate as often as needed; each time they are listed
    afresh.
    """

    def __init__(self, arguments: Sequence[str | os.PathLike[str]]) -> None:
        """InputError for an argument that is not there or cannot be listed, or for two that give
        equal ids.
        """
        self._parts = [_part(os.fspath(argument)) for argument in arguments]
        if not self._parts:
            raise InputError("no INPUT: give a folder, an image file, or @list.txt")
        if len(self._parts) > 1:
            _check_apart(self._parts)
            for _ in islice(self, _PEEK):
                pass

    def __iter__(self) -> Iterator[Source]:
        """Raises InputError on meeting two images with one id."""
        for index, part in enumerate(self._parts):
            for source in part.sources():
                for earlier in self._parts[:index]:
                    other = earlier.path_of(source.id)
                    if other is not None:
                        raise InputError(
                            f"{other} and {source.path} would both get the id {source.id!r}; "
                            "encode them into two folders, or give one folder that holds both"
                        )
                yield source


def _part(argument: str) -> _Folder | _File | _List:
    if argument.startswith("@"):
        return _List(argument[1:])
    if os.path.isdir(argument):
        return _Folder(argument)
    if not os.path.lexists(argument):
        raise InputError(f"INPUT {printable(argument)} does not exist")
    return _File(argument)


def _check_apart(parts: Sequence[_Folder | _File | _List]) -> None:
    folders = [
        (os.path.realpath(part.path), part.path) for part in parts if isinstance(part, _Folder)
    ]
    for index, (real, path) in enumerate(folders):
        for other_real, other in folders[:index]:
            if os.path.commonpath([real, other_real]) in (real, other_real):
                raise InputError(
                    f"INPUT {path} and INPUT {other} share files: give only the outer one"
                )


class _File:
    def __init__(self, path: str) -> None:
        self.path = path
        self._id = id_from(os.path.basename(path))

    def sources(self) -> Iterator[Source]:
        yield _named(self._id, self.path)

    def path_of(self, image_id: str) -> str | None:
        return self.path if image_id == self._id else None


class _Folder:
    def __init__(self, path: str) -> None:
        self.path = path
        try:
            os.scandir(path).close()
        except OSError as error:
            raise InputError(
                f"INPUT {printable(path)} cannot be listed: {error.strerror}"
            ) from error

    def sources(self) -> Iterator[Source]:
        return walk(self.path)

    def path_of(self, image_id: str) -> str | None:
        path = os.path.join(self.path, image_id)
        return path if _is_image_name(path) and os.path.isfile(path) else None


class _List:
    def __init__(self, path: str) -> None:
        self.path = path
        self._folder = os.path.dirname(os.path.abspath(path))
        self._ids: dict[str, str] | None = None
        try:
            with open(path, "rb"):
                pass
        except OSError as error:
            raise InputError(
                f"INPUT list {printable(path)} cannot be read: {error.strerror}"
            ) from error

    def sources(self) -> Iterator[Source]:
        seen: set[str] = set()
        for image_id, path in self._lines():
            if image_id in seen:
                logger.warning(
                    "%s names %s more than once; it is encoded once", self.path, image_id
                )
                continue
            seen.add(image_id)
            yield _named(image_id, path)

    def path_of(self, image_id: str) -> str | None:
        if self._ids is None:
            self._ids = dict(self._lines())
        return self._ids.get(image_id)

    def _lines(self) -> Iterator[tuple[str, str]]:
        with open(self.path, "rb") as file:
            for line in file:
                name = os.fsdecode(line.rstrip(b"\r\n"))
                if name:
                    path = os.path.normpath(os.path.join(self._folder, name))
                    inside = os.path.relpath(path, self._folder)
                    outside = inside.split(os.sep, 1)[0] == os.pardir
                    yield id_from(path.lstrip(os.sep) if outside else inside), path


def walk(root: str) -> Iterator[Source]:
    """The images of a folder and the folders in it, each folder's files sorted before its folders
    (see above).
    """
    stack = [_open_level("", root)]
    while stack:
        level = stack[-1]
        if not level.chunk:
            try:
                names = list(islice(level.entries, _SORTED_NAMES))
            except OSError as error:
                names = []
                yield _unlisted(level.prefix[:-1] or ".", level.path, error)
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
            if _is_image_name(entry.name):
                level.images += 1
                yield _checked(root, _named(id_from(name), entry.path))
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


def _close_level(level: _Level, stack: Sequence[_Level]) -> Iterator[Source]:
    if not stack:
        return
    if not level.images and _is_image_name(level.path):
        # Somebody expects a picture there.
        level.images = 1
        yield Source(
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


def _unlisted(name: str, path: str, error: OSError) -> Source:
    problem = f"the folder cannot be listed: {error.strerror or error}"
    return Source(id_from(name), path, problem=problem)


def _is_image_name(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS


def _named(image_id: str, path: str) -> Source:
    """With size and mtime; what cannot be an image file says so in `problem`."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        return Source(image_id, path, problem=f"cannot be read: {reason}")
    if stat.S_ISDIR(status.st_mode):
        return Source(image_id, path, problem="it is a folder")
    if not stat.S_ISREG(status.st_mode):
        return Source(image_id, path, problem="it is not a regular file")
    return Source(image_id, path, status.st_size, status.st_mtime)


def _checked(root: str, source: Source) -> Source:
    """The same, or with a problem where an escaped id is another file's true name."""
    if "\\x" in source.id and os.path.lexists(os.path.join(root, source.id)):
        relative = os.path.relpath(source.path, root)
        if printable(relative) != relative:
            reason = "its name is not UTF-8, and written as such it is the name of another file"
            return Source(source.id + " (not UTF-8)", source.path, problem=reason)
    return source


def id_from(path: str) -> str:
    """A path as an id: POSIX, UTF-8."""
    if os.sep != "/":
        path = path.replace(os.sep, "/")
    return printable(path)


def printable(path: str) -> str:
    """A path with every byte that is not UTF-8 written as \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def any_image(inputs: Iterable[Source]) -> bool:
    """Whether there is anything to encode at all."""
    return next(iter(inputs), None) is not None
