"""INPUT arguments -> the images they name.

Ids are POSIX paths: of a folder's images relative to that folder, of a file its name, of a list's
lines relative to the list's folder, of a shard's images the shard's and then the key or the number
of the row. What a list or an argument names outright is always tried, whatever its extension.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import TypeAlias

from vitrt.messages import reason_of
from vitrt.sources.folder import FileFilter, id_from, named, shown, unprintable, walk, would_be_met
from vitrt.sources.list_file import PEEK, ListFile, check_id
from vitrt.sources.location import is_url, local_path
from vitrt.sources.options import SourceOptions
from vitrt.sources.record import InputError, Record
from vitrt.sources.shards import RemoteFile, RemoteFolder, Shards, find_shards, remote_part

__all__ = ["InputError", "Inputs"]

logger = logging.getLogger(__name__)


class Inputs:
    """The images that the INPUT arguments stand for, listed afresh by every iteration."""

    def __init__(
        self, arguments: Sequence[str | os.PathLike[str]], options: SourceOptions | None = None
    ) -> None:
        """InputError for an argument that cannot be listed, or for two that give equal ids."""
        options = options or SourceOptions()
        self.file_filter = FileFilter(options.all_files)  # with what the last iteration left out
        self._parts = [_part(os.fspath(each), options, self.file_filter) for each in arguments]
        shards = [part for part in self._parts if isinstance(part, Shards)]
        by_columns = options.image_column is not None or options.id_column is not None
        if by_columns and not any(part.has_rows for part in shards):
            raise InputError("--image-column and --id-column are of tables, and no INPUT is one")
        self._ids: set[int] | None = set() if options.id_column is not None else None
        if not self._parts:
            raise InputError("no INPUT: give a folder, an image file, a shard, or @list.txt")
        self._files: dict[str, str] = {}  # id -> path: a shell's * names files by the thousand
        for part in self._parts:
            if isinstance(part, _File | RemoteFile):
                check_id(part.id, part.path, self._files.get(part.id))
                self._files[part.id] = part.path
        _check_prefixes(shards)
        if len(self._parts) > 1:
            _check_apart(self._parts, all_files=options.all_files)
            for part in self._parts:
                if isinstance(part, RemoteFolder):
                    part.keep_ids()
            if not any(isinstance(part, RemoteFolder | Shards) for part in self._parts):
                for _ in islice(self, PEEK):
                    pass

    def __iter__(self) -> Iterator[Record]:
        """Raises InputError on meeting two images with one id."""
        return self._records(lambda: False)

    def until(self, should_stop: Callable[[], bool]) -> Iterator[Record]:
        """The images, ending early once `should_stop`; logs which files were left out."""
        yield from self._records(should_stop)
        if self.file_filter.left_out:
            logger.info("%s", self.file_filter)

    def check_any(self) -> None:
        """InputError where there is nothing to encode at all."""
        if next(iter(self), None) is None:
            left_out = f": {self.file_filter}" if self.file_filter.left_out else ""
            raise InputError(f"the inputs hold no image{left_out}")

    def _records(self, should_stop: Callable[[], bool]) -> Iterator[Record]:
        self.file_filter.left_out.clear()
        if self._ids is not None:
            self._ids.clear()
        earlier: list[_Folder | ListFile | Shards | RemoteFolder] = []
        for part in self._parts:
            if isinstance(part, _File | RemoteFile):
                yield part.record()
                continue
            for record in part.records(should_stop):
                check_id(record.id, record.path, self._files.get(record.id))
                for other in earlier:
                    check_id(record.id, record.path, other.path_of(record.id))
                yield record if self._ids is None else _once(record, self._ids)
            earlier.append(part)


def _check_prefixes(parts: Sequence[Shards]) -> None:
    """InputError for two shards whose ids begin alike."""
    seen: dict[str, str] = {}
    for part in parts:
        for prefix, location in part.shards:
            check_id(prefix, location, seen.get(prefix))
            seen[prefix] = location


def _once(record: Record, ids: set[int]) -> Record:
    """The record; where an earlier row has its id, one whose `problem` says so."""
    if hash(record.id) in ids:
        again = f"{record.id} ({record.path})"
        return replace(record, id=again, problem="an image before it has the same id")
    ids.add(hash(record.id))
    return record


Part: TypeAlias = "_Folder | _File | ListFile | Shards | RemoteFolder | RemoteFile"


def _part(argument: str, options: SourceOptions, file_filter: FileFilter) -> Part:
    argument = local_path(argument)
    if is_url(argument):
        return remote_part(argument, options, file_filter)
    if argument.startswith("@"):
        return ListFile(argument[1:])
    if not os.path.lexists(argument):
        hint = ""
        if argument.startswith("data:"):
            hint = ": a data: URL is an image in Python; here, write its content to a file"
        raise InputError(f"INPUT {shown(argument)} does not exist{hint}")
    folder = _Folder(argument, file_filter) if os.path.isdir(argument) else None
    if shards := find_shards(argument, is_folder=folder is not None):
        return Shards(argument, shards, options, file_filter)
    if folder is not None:
        return folder
    return _File(argument)


def _check_apart(parts: Sequence[Part], *, all_files: bool) -> None:
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
        f"INPUT {shown(path)} and INPUT {shown(other)} share files: give only the outer one"
    )


class _File:
    def __init__(self, path: str) -> None:
        self.path = path
        self.id = id_from(os.path.basename(path))

    def record(self) -> Record:
        return named(self.id, self.path)


class _Folder:
    def __init__(self, path: str, file_filter: FileFilter) -> None:
        self.path = path
        self._file_filter = file_filter
        try:
            os.scandir(path).close()
        except OSError as error:
            raise InputError(f"INPUT {shown(path)} cannot be listed: {reason_of(error)}") from error

    def records(self, should_stop: Callable[[], bool]) -> Iterator[Record]:
        return walk(self.path, should_stop, self._file_filter)

    def path_of(self, image_id: str) -> str | None:
        for name in (image_id, unprintable(image_id)):
            if name is not None and self._file_filter.is_image(name):
                path = os.path.join(self.path, name)
                if os.path.isfile(path):
                    return path
        return None
