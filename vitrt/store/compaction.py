"""Take entries out of an output folder: their lines first, then their tensors.

Whatever moment it ends at, readers find each image that is listed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path

from vitrt.store.durable import OutputError, discard, free_bytes, remove, write_file
from vitrt.store.feature_shard import open_shard, read_header, write_shard
from vitrt.store.manifest import SHARD_NAME, Entry, entry_key, iter_manifest, manifests, shard_name
from vitrt.store.shard_numbers import ShardNumbers, keep_numbers


def compact(folder: Path, dropped: Iterable[tuple[str, str]]) -> None:
    """Remove replaced entries and `dropped` (id, shard) ones from manifests and shards.

    Each step leaves a folder that is right for readers: lines go first, a shard's copy is there
    before a manifest names it, and the old one is removed after no manifest does.
    """
    dead = {entry_key(*pair) for pair in dropped}
    for path in manifests(folder):
        dead.update(
            entry_key(entry.id, entry.replaces) for entry in iter_manifest(path) if entry.replaces
        )
    if dead:
        keep_numbers(folder)
        strip(folder, drop_lines(folder, dead), dead)
        forget_replaced(folder)


def drop_lines(
    folder: Path,
    dead: Collection[int],
    *,
    doubled: Collection[int] = (),
    broken: Collection[str] = (),
    unreadable: Collection[Path] = (),
) -> set[str]:
    """Remove lines from manifests; returns the shards that hold dead entries.

    Entries in `doubled` keep their first line. Manifests in `unreadable` have lines that are no
    entries, which go as well.
    """
    partly_dead: set[str] = set()
    seen: set[int] = set()

    def keep(entry: Entry) -> Entry | None:
        key = entry_key(entry.id, entry.shard)
        if key in dead or entry.shard in broken or key in seen:
            return None
        if key in doubled:
            seen.add(key)
        return entry

    if not (dead or doubled or broken or unreadable):
        return partly_dead
    for path in manifests(folder):
        changes = path in unreadable
        for entry in iter_manifest(path):
            key = entry_key(entry.id, entry.shard)
            if entry.shard in broken or key in doubled:
                changes = True
            elif key in dead:
                changes = True
                partly_dead.add(entry.shard)
        if changes:
            rewrite_manifest(path, keep)
    return partly_dead


def strip(folder: Path, partly_dead: Collection[str], dead: Collection[int]) -> None:
    """Replace shards by copies without the dead, as many at a time as half the free space takes."""
    if not partly_dead:
        return
    listed = _listed(folder)
    for name in set(partly_dead) - listed:
        remove(folder / name)  # nothing of it is left; that makes room
    numbers = ShardNumbers(folder)
    pending = sorted(listed.intersection(partly_dead), reverse=True)
    while pending:
        room = free_bytes(folder) // 2
        moved: dict[str, tuple[str, str]] = {}
        try:
            while pending:
                room -= (folder / pending[-1]).stat().st_size
                if moved and room < 0:
                    break
                name = pending.pop()
                moved[name] = _copy_without(folder, name, dead, numbers)
            _relist(folder, moved)
        except OutputError:
            listed = _listed(folder)
            for copy, _ in moved.values():
                if copy not in listed:
                    discard(folder / copy)
            raise
        for name in moved:
            remove(folder / name)


def _listed(folder: Path) -> set[str]:
    return {entry.shard for path in manifests(folder) for entry in iter_manifest(path)}


def _relist(folder: Path, moved: Mapping[str, tuple[str, str]]) -> None:
    """Have the manifests name the copies of shards, and their checksums, instead of them."""

    def change(entry: Entry) -> Entry:
        shard, crc32 = moved.get(entry.shard, (entry.shard, entry.crc32))
        return replace(entry, shard=shard, crc32=crc32)

    for path in manifests(folder):
        if any(entry.shard in moved for entry in iter_manifest(path)):
            rewrite_manifest(path, change)


def forget_replaced(folder: Path) -> None:
    """Drop the notes of which shards entries replaced: those are gone, and their names are free."""
    for path in manifests(folder):
        if any(entry.replaces for entry in iter_manifest(path)):
            rewrite_manifest(path, lambda entry: replace(entry, replaces=None))


def _copy_without(
    folder: Path, name: str, dead: Collection[int], numbers: ShardNumbers
) -> tuple[str, str]:
    """Copy a shard without its dead images; the name and checksum of the copy."""
    header = read_header(folder / name)
    with open_shard(folder / name) as shard:
        kept = [
            (tensor, shard.get_tensor(tensor).contiguous())
            for tensor in header.tensors
            if entry_key(tensor.rpartition("/")[0], name) not in dead
        ]
    match = SHARD_NAME.fullmatch(name)
    assert match is not None
    rank = int(match[1])
    target = folder / shard_name(rank, numbers.take(rank))
    return target.name, write_shard(target, kept, header.metadata)


def rewrite_manifest(path: Path, change: Callable[[Entry], Entry | None]) -> None:
    """Replace each entry by what `change` makes of it (None: nothing), all of them at once."""
    changed = (change(entry) for entry in iter_manifest(path))
    lines = (entry.line().encode() for entry in changed if entry is not None)
    write_file(path, batched_bytes(lines))


def batched_bytes(lines: Iterable[bytes]) -> Iterator[bytes]:
    """The bytes of `lines` in pieces that are worth a system call."""
    iterator = iter(lines)
    while block := b"".join(islice(iterator, 4096)):
        yield block
