"""One pass over an output folder's manifests, and the headers of the shards that they list."""

from __future__ import annotations

from array import array
from collections.abc import Set
from itertools import groupby
from pathlib import Path

import numpy as np

from vitrt.store.durable import OutputError
from vitrt.store.feature_shard import kinds_held, kinds_of, read_header
from vitrt.store.manifest import Damage, Entry, entry_key, iter_manifest, manifests
from vitrt.tensor_file import TensorFileError


class FolderScan:
    """What is wrong with a folder that nobody writes into, in a few bytes an image."""

    def __init__(self, folder: Path) -> None:
        """OutputError where a shard is there and cannot be read."""
        self.damage: dict[Path, Damage] = {}  # of each manifest
        self.listed: set[str] = set()  # shards
        self.broken: dict[str, str] = {}  # shard -> why none of its images can be read
        self.dead: set[int] = set()  # entries to remove, by `entry_key`
        self.partly_dead: set[str] = set()  # shards that hold tensors of these
        self.doubled: set[int] = set()  # entries listed more than once, of which the first stays
        self.incomplete = 0  # images that lack a tensor
        self._folder = folder
        self._unlisted: dict[str, Set[str]] = {}
        self._ids = array("q")
        for path in manifests(folder):
            self.damage[path] = Damage()
            entries = iter_manifest(path, self.damage[path])
            for name, group in groupby(entries, key=lambda entry: entry.shard):
                self._shard(name, list(group))
        for name, ids in self._unlisted.items():
            self.dead.update(entry_key(image_id, name) for image_id in ids)
            self.partly_dead.update([name] if ids else [])
        self._find_doubles()

    def _shard(self, name: str, entries: list[Entry]) -> None:
        try:
            header = read_header(self._folder / name)
        except TensorFileError as error:
            cause = error.__cause__
            if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):
                raise OutputError("read", self._folder / name, cause) from error
            self.broken[name] = str(error)
            return
        held, wanted = kinds_held(header), kinds_of(header.metadata)
        if any(tensor.endswith("deepstack") for tensor in header.tensors):
            wanted |= {"deepstack"}  # one model, so all images have it
        unlisted = held.keys() - {entry.id for entry in entries}
        if name in self.listed:  # in another place as well
            unlisted &= self._unlisted.get(name, set())
        self._unlisted[name] = unlisted
        self.listed.add(name)
        for entry in entries:
            if held.get(entry.id) != wanted:
                self.incomplete += 1
                self.dead.add(entry_key(entry.id, name))
                self.partly_dead.add(name)
                continue
            self._ids.append(hash(entry.id))
            if entry.replaces is not None:
                self.dead.add(entry_key(entry.id, entry.replaces))

    def _find_doubles(self) -> None:
        """Images that are listed twice; an entry that another one replaces does not count."""
        ids = np.sort(np.frombuffer(self._ids, np.int64)) if self._ids else np.empty(0, np.int64)
        repeated = set(ids[1:][ids[1:] == ids[:-1]].tolist())
        first: dict[int, str] = {}
        for path in self.damage if repeated else ():
            for entry in iter_manifest(path):
                image, key = hash(entry.id), entry_key(entry.id, entry.shard)
                if image not in repeated or key in self.dead or entry.shard in self.broken:
                    continue
                if image not in first:
                    first[image] = entry.shard
                elif first[image] == entry.shard:
                    self.doubled.add(key)
                else:
                    self.dead.add(key)
                    self.partly_dead.add(entry.shard)
