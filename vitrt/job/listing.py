"""INPUT arguments -> the images they name.

Ids are POSIX paths: of a folder's images relative to that folder, of a file its name. A line of
`@list.txt` is taken relative to the list's own folder; its id is the path relative to that folder
where it lies inside, else the whole path without its leading "/". What a list or an argument names
outright is always tried, whatever its extension.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from vitrt.job.walk import Source, id_from, is_image_name, named, printable, walk

__all__ = ["InputError", "Inputs", "Source", "any_image"]

logger = logging.getLogger(__name__)

_PEEK = 50_000  # images looked through for two with one id before anything is written


class InputError(ValueError):
    """An INPUT that cannot be used."""


class Inputs:
    """The images behind the INPUT arguments, listed afresh by every iteration."""

    def __init__(self, arguments: Sequence[str | os.PathLike[str]]) -> None:
        """InputError for an argument that cannot be listed, or for two that give equal ids."""
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
        yield named(self._id, self.path)

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
        return path if is_image_name(path) and os.path.isfile(path) else None


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
            yield named(image_id, path)

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


def any_image(inputs: Iterable[Source]) -> bool:
    """Whether there is anything to encode at all."""
    return next(iter(inputs), None) is not None
