"""The images in a tar, as WebDataset has them: `shard.tar/key`.

A key is a member's name up to the first dot behind its last slash. Where a sample, which is a run
of members with one key, has several images, each has its extension, too: `shard.tar/key.left.png`.
"""

from __future__ import annotations

import logging
import tarfile
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import BinaryIO

from vitrt.sources.folder import Choice, id_from
from vitrt.sources.location import AHEAD, is_url, open_location, state_of
from vitrt.sources.record import Record

logger = logging.getLogger(__name__)

MOST_BYTES = 1 << 30  # of an image, which is in memory as a whole while it is decoded


def check_tar(location: str) -> None:
    """OSError or ValueError where it cannot be read, or is none."""
    with open_location(location) as file:
        _open(file)


def tar_records(
    location: str, prefix: str, choice: Choice, should_stop: Callable[[], bool]
) -> Iterator[Record]:
    """The images of the archive at a path or URL, with ids `prefix`/key.

    One that is damaged or cut short gives those before that place, and a record that says so.
    """
    _, mtime = state_of(location)
    seen: set[int] = set()
    damage: list[Exception] = []
    with open_location(location) as file:
        members = _images(location, file, choice, should_stop, damage)
        for key, sample in groupby(members, key=lambda member: _key(member.name)):
            images = list(sample)
            for member in images:
                name, problem = key if len(images) == 1 else member.name, _problem_of(member)
                if hash(name) in seen:
                    name, problem = member.name, f"the archive has another image of key {key}"
                seen.add(hash(name))
                image_id, path = id_from(f"{prefix}/{name}"), f"{location}/{member.name}"
                place = ("part", location, member.offset_data, member.size)
                yield Record(image_id, path, member.size, mtime, problem, place)
    for error in damage:
        yield Record(id_from(prefix), location, problem=f"the archive cannot be read on: {error}")


def _images(
    location: str,
    file: BinaryIO,
    choice: Choice,
    should_stop: Callable[[], bool],
    damage: list[Exception],
) -> Iterator[tarfile.TarInfo]:
    """The members that are images; an error that ends them is put into `damage`."""
    try:
        archive = _open(file)
        while not should_stop() and (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # grows with each otherwise
            member.name = member.name.removeprefix("./")
            hidden = any(part.startswith(".") for part in member.name.split("/"))
            if member.isdir() or hidden or not choice.takes(member.name):
                continue
            if is_url(location) and _problem_of(member) is None:
                file.seek(member.offset_data)
                data = file.read(member.size)
                if len(data) == member.size:
                    AHEAD.put(location, member.offset_data, data)
            yield member
        if not should_stop():
            _check_end(location, file, archive.offset)
    except (tarfile.TarError, OSError, ValueError) as error:
        damage.append(error)


def _check_end(location: str, file: BinaryIO, offset: int) -> None:
    """What is no header ends an archive for tarfile, as the blocks of zeros at its end do."""
    file.seek(offset)
    rest = file.read(tarfile.BLOCKSIZE)
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


def _problem_of(member: tarfile.TarInfo) -> str | None:
    if not member.isreg() or member.issparse():
        return "it is not a regular file of the archive"
    if member.size > MOST_BYTES:
        return f"its {member.size} bytes are more than the {MOST_BYTES} that an image may have here"
    return None
