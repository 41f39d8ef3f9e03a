"""What a source lists: one image to encode, where it lies and in what state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vitrt.sources.location import read_part, read_whole, remote_state
from vitrt.sources.row_reader import load_row


class InputError(ValueError):
    """An INPUT that cannot be used."""


@dataclass(frozen=True, slots=True)
class Record:
    """One image to encode. Plain values alone, so that another process can load it as well."""

    id: str
    path: str  # of its file; for an image at a URL or inside another file, what messages call it
    size: int = 0  # in bytes; with `mtime`, what tells a changed image from an old one
    mtime: float = 0.0  # in seconds
    problem: str | None = None  # why it is known to be unusable
    place: Sequence[
        str | int
    ] = ()  # how to load it where it has no file of its own on this machine

    def load(self) -> str | bytes:
        """What `ImageProcessor.prepare` takes: the path of a file of its own, else the content.

        Called in the thread that decodes. OSError or ValueError where it cannot be had.
        """
        if not self.place:
            return self.path
        kind, location, *where = self.place
        if kind == "url":
            return read_whole(str(location))
        if kind == "part":
            start, size = map(int, where)
            return read_part(str(location), start, size)
        run, row, column = where
        state = self.size, self.mtime
        return load_row(str(location), int(run), int(row), str(column), state)


def remote_record(image_id: str, url: str, info: Mapping[str, Any]) -> Record:
    """An image at a URL, by what its file system says of it."""
    size, mtime = remote_state(info)
    return Record(image_id, url, size, mtime, place=("url", url))
