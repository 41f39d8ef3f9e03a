"""`@list.txt`: a text of paths, one a line.

A line is taken relative to the list's own folder; its id is the path relative to that folder where
it lies inside, else the whole path without its leading "/"; ".." in it means what it means to the
system, also behind a link. Of a URL the id is what follows its "://". A byte order mark of UTF-8
and blank lines are no part of a list.
"""

from __future__ import annotations

import codecs
import logging
import os
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

from vitrt.messages import reason_of
from vitrt.sources.folder import id_from, named, shown
from vitrt.sources.location import filesystem, is_url, local_path
from vitrt.sources.record import InputError, Record, remote_record
from vitrt.sources.shards import is_shard_name

logger = logging.getLogger(__name__)

_BLOCK = 64  # lines looked up together
_ASKED_AT_ONCE = 16  # URLs
PEEK = 50_000  # images looked through for two with one id before anything is written


def check_id(image_id: str, path: str, other: str | None) -> None:
    """InputError where there is an `other` path of that id."""
    if other is not None:
        raise InputError(
            f"{shown(other)} and {shown(path)} would both get the id {shown(image_id)!r}; "
            "encode them into two folders, or give one folder that holds both"
        )


class ListFile:
    def __init__(self, path: str) -> None:
        self.path = path
        self._folder = os.path.dirname(_without_dots(os.path.join(os.getcwd(), path)))
        self._paths: dict[str, str] | None = None
        try:
            mode = os.stat(path).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # opening a folder says what it is
                raise InputError(
                    f"INPUT list {shown(path)} is not a regular file, and a list is read more "
                    "than once: write it to a file first"
                )
            for _ in islice(self._lines(), PEEK):
                pass
        except OSError as error:
            raise InputError(
                f"INPUT list {shown(path)} cannot be read: {reason_of(error)}"
            ) from error

    def records(self, should_stop: Callable[[], bool]) -> Iterator[Record]:
        with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
            lines = self._once()
            while block := list(islice(lines, _BLOCK)):
                remote = any(is_url(path) for _, path in block)
                for record in pool.map(_record, block) if remote else map(_record, block):
                    if should_stop():
                        return
                    yield record

    def _once(self) -> Iterator[tuple[str, str]]:
        for image_id, path, is_repeated in self._lines():
            if is_repeated:
                logger.warning(
                    "%s names %s more than once; it is encoded once", self.path, image_id
                )
            else:
                yield image_id, path

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
            check_id(image_id, path, None if other == path else other)
            yield image_id, written, True

    def _names(self) -> Iterator[tuple[str, str, str]]:
        """The id of each line, its path without "..", and its path as written, to be opened."""
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                if number == 1:
                    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                        raise InputError(
                            f"INPUT list {shown(self.path)} is UTF-16; save it as UTF-8"
                        )
                    line = line.removeprefix(codecs.BOM_UTF8)
                if b"\0" in line:
                    raise InputError(
                        f"INPUT list {shown(self.path)} holds a NUL byte in line {number}; "
                        "expected UTF-8 text, one path a line"
                    )
                name = local_path(os.fsdecode(line.rstrip(b"\r\n")))
                if is_url(name):
                    yield id_from(name.partition("://")[2]), name, name
                elif name.strip():
                    written = os.path.join(self._folder, name)
                    path = _without_dots(written)
                    inside = os.path.relpath(path, self._folder)
                    outside = inside.split(os.sep, 1)[0] == os.pardir
                    yield id_from(path.lstrip(os.sep) if outside else inside), path, written


def _record(line: tuple[str, str]) -> Record:
    image_id, path = line
    if is_shard_name(path):
        problem = "a list names images: give a shard as an INPUT of its own"
        return Record(image_id, path, problem=problem)
    if not is_url(path):
        return named(image_id, path)
    try:
        system, remote_path = filesystem(path)
        return remote_record(image_id, path, system.info(remote_path))
    except Exception as error:  # whatever a server, or its library, raises
        return Record(image_id, path, problem=f"cannot be read: {reason_of(error)}")


def _without_dots(path: str) -> str:
    """An absolute path without "." and "..", that names the same file.

    A ".." after a link leaves the folder that it leads to, where os.path.normpath drops the link.
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
