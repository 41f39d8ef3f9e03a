"""The images in a tar, as WebDataset has them: `shard.tar/key`.

A key is a member's name up to the first dot after its last slash. Where a sample, which is a run
of members with one key, has several images, each has its extension, too: `shard.tar/key.left.png`.
"""

from __future__ import annotations

import logging
import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import BinaryIO

from vitrt.sources.folder import FileFilter, id_from
from vitrt.sources.location import AHEAD, is_url, open_location, state_of
from vitrt.sources.record import Record

logger = logging.getLogger(__name__)

MOST_BYTES = 1 << 30  # of an image, which is in memory as a whole while it is decoded
_BLOCK = tarfile.BLOCKSIZE
_TELLING = (b" path=", b" size=", b"sparse")  # pax keys that change a member's name, size or kind


@dataclass(frozen=True, slots=True)
class _Member:
    """A file in an archive."""

    name: str
    start: int  # of its content, in bytes
    size: int
    is_regular: bool = True

    @property
    def problem(self) -> str | None:
        if not self.is_regular:
            return "it is not a regular file of the archive"
        if self.size > MOST_BYTES:
            return f"its {self.size} bytes are more than the {MOST_BYTES} that an image may have"
        return None


def check_tar(location: str) -> None:
    """OSError or ValueError where it cannot be read, or is none."""
    with open_location(location) as file:
        _open(file)


def tar_records(
    location: str, prefix: str, file_filter: FileFilter, should_stop: Callable[[], bool]
) -> Iterator[Record]:
    """The images of the archive at a path or URL, with ids `prefix`/key.

    One that is damaged or cut short gives those before that place, and a record that says so.
    """
    _, mtime = state_of(location)
    seen: set[int] = set()
    damage: list[Exception] = []
    with open_location(location) as file:
        members = _members(location, file, file_filter, should_stop, damage)
        for key, sample in groupby(members, key=lambda member: _key(member.name)):
            together = list(sample)
            images = [member for member in together if file_filter.is_image(member.name)]
            for member in together if not images else ():  # beside an image they are its captions
                file_filter.takes(member.name)
            for member in images:
                name, problem = key if len(images) == 1 else member.name, member.problem
                if hash(name) in seen:
                    name, problem = member.name, f"the archive has another image of key {key}"
                seen.add(hash(name))
                image_id, path = id_from(f"{prefix}/{name}"), f"{location}/{member.name}"
                place = ("part", location, member.start, member.size)
                yield Record(image_id, path, member.size, mtime, problem, place)
    for error in damage:
        yield Record(id_from(prefix), location, problem=f"the archive cannot be read on: {error}")


def _members(
    location: str,
    file: BinaryIO,
    file_filter: FileFilter,
    should_stop: Callable[[], bool],
    damage: list[Exception],
) -> Iterator[_Member]:
    """The members that are not hidden; an error that ends them is put into `damage`."""
    try:
        archive = _open(file)
        archive.offset = 0
        while not should_stop() and (member := _next(archive, file)) is not None:
            hidden = any(part.startswith(".") for part in member.name.split("/"))
            if hidden:
                continue
            if is_url(location) and file_filter.is_image(member.name) and member.problem is None:
                file.seek(member.start)
                data = file.read(member.size)
                if len(data) == member.size:
                    AHEAD.put(location, member.start, data)
            yield member
        if not should_stop():
            _check_end(location, file, archive.offset)
    except (tarfile.TarError, OSError, ValueError) as error:
        damage.append(error)


def _next(archive: tarfile.TarFile, file: BinaryIO) -> _Member | None:
    """The next member that is no folder, moving `archive.offset` past it; None at the end."""
    while True:
        offset = archive.offset
        if (member := _plain(file, offset)) is not None:
            archive.offset = member.start + -(-member.size // _BLOCK) * _BLOCK
            return member
        file.seek(0)  # elsewhere: or tarfile would not notice an end inside the last member
        archive.firstmember = None  # type: ignore[attr-defined]
        if (info := archive.next()) is None:
            return None
        archive.members.clear()  # type: ignore[attr-defined]  # grows with each otherwise
        if not info.isdir():
            regular = info.isreg() and not info.issparse()
            return _Member(info.name.removeprefix("./"), info.offset_data, info.size, regular)


def _plain(file: BinaryIO, offset: int) -> _Member | None:
    """The regular file at `offset` of an archive; None where its header has anything unusual.

    tarfile takes 50 microseconds a member and holds the GIL, which decoding threads wait for: with
    the text that goes with an image, eight times as much as listing a folder.
    """
    file.seek(offset)
    header = file.read(_BLOCK)
    if header[156:157] == b"x":  # more about the next one: its time to a fraction of a second, say
        length = _number(header[124:136])
        records = file.read(_BLOCK)
        if length is None or length > _BLOCK or any(key in records for key in _TELLING):
            return None
        offset += 2 * _BLOCK
        header = file.read(_BLOCK)
    size, checksum = _number(header[124:136]), _number(header[148:156])
    if header[156:157] not in (b"0", b"\0") or size is None:
        return None
    if checksum != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        return None
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    if name.endswith(b"/"):  # how the oldest archives write a folder
        return None
    return _Member(os.fsdecode(name.removeprefix(b"./")), offset + _BLOCK, size)


def _number(field: bytes) -> int | None:
    """A number in octal digits; None where it is written in another way."""
    digits = field.strip(b" \0")
    return int(digits, 8) if digits.isdigit() else None


def _check_end(location: str, file: BinaryIO, offset: int) -> None:
    """ReadError where no blocks of zeros end the archive: tarfile stops at any damaged header."""
    file.seek(offset)
    rest = file.read(_BLOCK)
    if rest.strip(b"\0"):
        raise tarfile.ReadError(f"damaged at byte {offset}")
    if not rest:
        logger.warning("%s ends without its last blocks: was it cut short?", location)


def _open(file: BinaryIO) -> tarfile.TarFile:
    start = file.read(2)
    file.seek(0)
    if start == b"\x1f\x8b":
        raise ValueError("it is compressed: unpack it to .tar, whose members can be read singly")
    return tarfile.open(fileobj=file, mode="r:")


def _key(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return folder + slash + (base.partition(".")[0] or base)
