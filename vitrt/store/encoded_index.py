"""Which images a folder holds already, in 20 bytes an image."""

from __future__ import annotations

from array import array
from hashlib import blake2b
from pathlib import Path

import numpy as np

from vitrt.store.manifest import SourceImage, iter_manifest, manifests


class EncodedIndex:
    """What the manifests of a recovered folder list, by hashes.

    An image is taken for another one's with a probability of 2 ** -128: its id and its size and
    mtime are hashed to 64 bits each.
    """

    def __init__(self, folder: Path) -> None:
        ids, states, shards = array("Q"), array("Q"), array("I")
        self._shards: list[str] = []
        numbers: dict[str, int] = {}
        for path in manifests(folder):
            for entry in iter_manifest(path):
                if entry.shard not in numbers:
                    numbers[entry.shard] = len(self._shards)
                    self._shards.append(entry.shard)
                ids.append(_hash(entry.id))
                states.append(_state(entry.size, entry.mtime))
                shards.append(numbers[entry.shard])
        unsorted = np.frombuffer(ids, np.uint64) if ids else np.empty(0, np.uint64)
        order = np.argsort(unsorted)
        self._ids = unsorted[order]
        self._states = np.frombuffer(states, np.uint64)[order] if ids else unsorted
        self._numbers = np.frombuffer(shards, np.uint32)[order] if ids else unsorted

    def __len__(self) -> int:
        return len(self._ids)

    def shard_of_id(self, image_id: str) -> str | None:
        """The shard that holds an image of this id, in whatever state; None where there is none."""
        row = self._row(image_id)
        return None if row is None else self._shards[int(self._numbers[row])]

    def holds(self, image: SourceImage) -> bool:
        """Whether the image is there in its present state: neither size nor mtime has changed."""
        row = self._row(image.id)
        return row is not None and int(self._states[row]) == _state(image.size, image.mtime)

    def _row(self, image_id: str) -> int | None:
        wanted = np.uint64(_hash(image_id))
        row = int(np.searchsorted(self._ids, wanted))
        return row if row < len(self._ids) and self._ids[row] == wanted else None


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def _state(size: int, mtime: float) -> int:
    return _hash(f"{size} {mtime!r}")
