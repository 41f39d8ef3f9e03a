"""What a source lists: one image to encode, where it lies and in what state."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Record:
    """One image to encode. Plain values alone, so that another process can load it as well."""

    id: str
    path: str  # its file; for an image inside another file, what messages call it
    size: int = 0  # in bytes; with `mtime`, what tells a changed image from an old one
    mtime: float = 0.0  # in seconds
    problem: str | None = None  # why it is known to be unusable

    def load(self) -> str | bytes:
        """What `ImageProcessor.prepare` takes: the path of a file of its own, else the content.

        Called in the thread that decodes. OSError or ValueError where it cannot be had.
        """
        return self.path
