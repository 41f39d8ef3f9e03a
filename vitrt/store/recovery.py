"""Make an output folder consistent before a run: whatever moment the last one died at.

Afterwards every manifest line is whole, every listed shard is complete and holds exactly its listed
images, each image is listed once, and nothing else of ours lies in the folder.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import groupby, islice
from pathlib import Path

from safetensors import safe_open

from vitrt.store.durable import flush_folder, remove, truncate, write_file
from vitrt.store.feature_shard import ShardError, ShardHeader, encode_shard, read_header
from vitrt.store.manifest import (
    ERRORS_NAME,
    MANIFEST_NAME,
    SHARD_NAME,
    TEMPORARY_NAME,
    Entry,
    RunIdentity,
    iter_manifest,
    manifests,
    matching,
    shard_name,
    superseded,
    temporary_path,
    torn_from,
)

logger = logging.getLogger(__name__)


class FolderMismatchError(ValueError):
    """The folder belongs to a run with another model, dtype or pixel limits."""


def check_identity(folder: Path, identity: RunIdentity) -> None:
    """FolderMismatchError, naming each difference, if the folder's features are of another kind."""
    for path in matching(folder, SHARD_NAME):
        try:
            metadata = read_header(path).metadata
        except ShardError:
            continue  # an unfinished or broken one says nothing; recovery deals with it
        differences = identity.differences(metadata)
        if differences:
            raise FolderMismatchError(
                f"{folder} holds the features of another run: {'; '.join(differences)}. "
                "Choose another --output, or --overwrite to replace them"
            )
        return


def clear(folder: Path) -> None:
    """Remove everything that runs have written into the folder; other files stay."""
    # Manifests first: without them, shards are leftovers whatever moment this dies at.
    for pattern in (MANIFEST_NAME, ERRORS_NAME, SHARD_NAME, TEMPORARY_NAME):
        paths = matching(folder, pattern)
        for path in paths:
            remove(path)
        if paths:
            flush_folder(folder)


def recover(folder: Path) -> None:
    """Repair what a killed run or a power cut left; drop the last run's errors, to be retried."""
    for pattern in (TEMPORARY_NAME, ERRORS_NAME):
        for path in matching(folder, pattern):
            remove(path)
    for path in manifests(folder):
        _cut_torn_lines(path)
    _drop_broken_shards(folder)
    compact(folder, ())
    flush_folder(folder)


def _cut_torn_lines(path: Path) -> None:
    valid, dropped = torn_from(path)
    if dropped:
        logger.warning("%s: dropping %d unfinished line(s) of the last run", path, dropped)
        truncate(path, valid)


def _drop_broken_shards(folder: Path) -> None:
    """Forget shards that are incomplete or only partly listed, and remove those not listed."""
    listed: set[str] = set()
    for path in manifests(folder):
        broken: set[str] = set()
        for name, entries in groupby(iter_manifest(path), key=lambda entry: entry.shard):
            reason = _unusable(folder / name, entries)
            if reason is not None:
                logger.warning("dropping %s, its images are encoded again: %s", name, reason)
                broken.add(name)
            listed.add(name)
        if broken:
            rewrite_manifest(path, lambda entry: None if entry.shard in broken else entry)  # noqa: B023
            listed -= broken
    for path in matching(folder, SHARD_NAME):
        if path.name not in listed:
            logger.info("removing %s, which the last run did not get to list", path.name)
            remove(path)


def _unusable(path: Path, entries: Iterable[Entry]) -> str | None:
    """None, or why the shard cannot be what these entries list."""
    listed = {entry.id for entry in entries}
    try:
        held = ids_of(read_header(path))
    except ShardError as error:
        return str(error)
    if held != listed:
        return f"it holds {len(held)} images, of which {len(held & listed)} are listed"
    return None


def ids_of(header: ShardHeader) -> set[str]:
    """The images that a shard holds tensors of."""
    return {name.rpartition("/")[0] for name in header.tensors}


def rewrite_manifest(path: Path, change: Callable[[Entry], Entry | None]) -> None:
    """Replace each entry by what `change` makes of it (None: nothing), all of them at once."""
    changed = (change(entry) for entry in iter_manifest(path))
    lines = (entry.line().encode() for entry in changed if entry is not None)
    write_file(path, batched_bytes(lines), temporary=temporary_path(path))


def batched_bytes(lines: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in pieces worth a system call."""
    iterator = iter(lines)
    while block := b"".join(islice(iterator, 4096)):
        yield block


def compact(folder: Path, dropped: Iterable[tuple[str, str]]) -> None:
    """Remove replaced entries and `dropped` (id, shard) ones from manifests and shards.

    Each step leaves a folder that is right for readers: the new shard is there before a manifest
    names it, and the old one is removed after no manifest does.
    """
    dead = superseded(folder) | set(dropped)
    if not dead:
        return
    lost: dict[str, set[str]] = {}
    for image, shard in dead:
        lost.setdefault(shard, set()).add(image)
    numbers = ShardNumbers(folder)
    for path in manifests(folder):
        touched = {entry.shard for entry in iter_manifest(path)} & lost.keys()
        moved = {name: _copy_without(folder, name, lost[name], numbers) for name in sorted(touched)}

        def change(entry: Entry, moved: dict[str, str | None] = moved) -> Entry | None:
            if (entry.id, entry.shard) in dead:
                return None
            return replace(entry, shard=moved.get(entry.shard) or entry.shard)

        if moved:
            rewrite_manifest(path, change)
        for name in moved:
            remove(folder / name)
    # Now that what they replaced is gone, the notes would only make its shards' names unusable.
    for path in manifests(folder):
        if any(entry.replaces for entry in iter_manifest(path)):
            rewrite_manifest(path, lambda entry: replace(entry, replaces=None))


def _copy_without(folder: Path, name: str, lost: set[str], numbers: ShardNumbers) -> str | None:
    """Copy a shard without some images; the name of the copy, or None where nothing is left."""
    header = read_header(folder / name)
    with safe_open(folder / name, framework="pt") as shard:
        kept = [
            (tensor, shard.get_tensor(tensor).contiguous())
            for tensor in header.tensors
            if tensor.rpartition("/")[0] not in lost
        ]
    if not kept:
        return None
    match = SHARD_NAME.fullmatch(name)
    assert match is not None
    rank = int(match[1])
    target = folder / shard_name(rank, numbers.take(rank))
    write_file(target, encode_shard(kept, header.metadata), temporary=temporary_path(target))
    return target.name


class ShardNumbers:
    """Hands out shard numbers of a rank, above all in the folder and all that manifests mention."""

    def __init__(self, folder: Path) -> None:
        names = {path.name for path in matching(folder, SHARD_NAME)}
        for path in manifests(folder):
            for entry in iter_manifest(path):
                names.update(name for name in (entry.shard, entry.replaces) if name)
        self._next: dict[int, int] = {}
        for match in map(SHARD_NAME.fullmatch, names):
            assert match is not None
            rank, number = int(match[1]), int(match[2])
            self._next[rank] = max(self._next.get(rank, 0), number + 1)

    def take(self, rank: int) -> int:
        number = self._next.get(rank, 0)
        self._next[rank] = number + 1
        return number
