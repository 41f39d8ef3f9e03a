"""The numbers of shards, which never come again: a name stands for the same bytes for good."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from vitrt.store.durable import FULL, OutputError, write_file
from vitrt.store.manifest import SHARD_NAME, manifests, matching

logger = logging.getLogger(__name__)

NUMBERS_NAME = ".shard-numbers.json"


class ShardNumbers:
    """Hands out shard numbers of a rank, above all that the folder ever listed.

    That is what lies in it, what its manifests mention, and what `keep_numbers` noted before shards
    went: a reader that has a shard open, or has yet to, never finds another one under its name.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / NUMBERS_NAME
        self._kept = _read(self._path)
        names = {path.name for path in matching(folder, SHARD_NAME)}
        for path in manifests(folder):
            with path.open(encoding="ascii", errors="replace") as file:  # JSON as written is ASCII
                for line in file:  # unparsed: reading tens of millions of objects takes minutes
                    names.update(match[0] for match in SHARD_NAME.finditer(line))
        self._next = dict(self._kept)
        for match in map(SHARD_NAME.fullmatch, names):
            assert match is not None
            rank, number = int(match[1]), int(match[2])
            self._next[rank] = max(self._next.get(rank, 0), number + 1)

    def take(self, rank: int) -> int:
        number = self._next.get(rank, 0)
        self._next[rank] = number + 1
        return number

    def keep(self) -> None:
        if self._next != self._kept:
            noted = {str(rank): number for rank, number in self._next.items()}
            write_file(self._path, [json.dumps(noted).encode()])


def keep_numbers(folder: Path) -> None:
    """Note on the disk, before shards are removed, which numbers there were."""
    try:
        ShardNumbers(folder).keep()
    except OutputError as error:
        if error.errno not in FULL:
            raise
        logger.warning("shard numbers of %s may come again: %s", folder, error)


def _read(path: Path) -> dict[int, int]:
    try:
        return {int(rank): int(number) for rank, number in json.loads(path.read_text()).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        logger.warning("%s cannot be read, shard numbers may come again: %s", path, error)
        return {}
