"""A file that is written piece by piece, and carried on with after whatever ended the writing.

Its journal has a line for every piece: where the piece ends, and its digest. Resuming reads the
pieces back and keeps those that answer to their lines, so that neither file need reach the disk in
any order: a tail of zeros, which a power cut leaves, ends what is kept.
"""

from __future__ import annotations

import os
import re
from hashlib import blake2b
from pathlib import Path

MOST_PIECE_BYTES = 1 << 26  # of a line that can be believed
_LINE = re.compile(rb"(\d+) ([0-9a-f]{32})\n")


class PartialFile:
    """Opens `path` to write on after what it verifiably holds already."""

    def __init__(self, path: Path) -> None:
        journal = path.with_name(f"{path.name}.journal")
        self._path, self._journal_path = path, journal
        path.touch()
        journal.touch()
        self._file = path.open("r+b")
        self._journal = journal.open("r+b")
        self.size, lines = self._verified()
        for file, length in ((self._file, self.size), (self._journal, lines)):
            file.truncate(length)
            file.seek(length)

    def _verified(self) -> tuple[int, int]:
        """Bytes of the file, and of the journal, that belong together."""
        end = lines = 0
        for line in self._journal:
            found = _LINE.fullmatch(line)
            if not found or not 0 <= int(found[1]) - end <= MOST_PIECE_BYTES:
                break
            piece = self._file.read(int(found[1]) - end)
            if end + len(piece) != int(found[1]) or _digest(piece) != found[2]:
                break
            end, lines = end + len(piece), lines + len(line)
        return end, lines

    def write(self, piece: bytes) -> None:
        self._file.write(piece)
        self._file.flush()  # before the line that speaks of it
        self.size += len(piece)
        self._journal.write(b"%d %s\n" % (self.size, _digest(piece)))
        self._journal.flush()

    def finish(self, target: Path) -> None:
        """Flush the file to the disk, then give it its name."""
        os.fsync(self._file.fileno())
        self._path.rename(target)
        self._journal_path.unlink()

    def __enter__(self) -> PartialFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        self._journal.close()


def _digest(piece: bytes) -> bytes:
    return blake2b(piece, digest_size=16).hexdigest().encode()
