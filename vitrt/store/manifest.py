"""The records beside the shards: which image lies where.

A manifest is a log, appended to and flushed shard by shard. An entry that names in `replaces` the
shard of an older entry of the same image takes its place, whichever manifests the two are in.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from sys import intern
from typing import Any, Protocol

from vitrt.messages import counted

SHARD_NAME = re.compile(r"features-(\d{5})-(\d{5,})\.safetensors")
MANIFEST_NAME = re.compile(r"manifest-(\d{5})\.jsonl")
ERRORS_NAME = re.compile(r"errors-(\d{5})\.jsonl")
TEMPORARY_NAME = re.compile(r"\.((features|manifest|part)-[\d-]+|shard-numbers)\.tmp")

logger = logging.getLogger(__name__)


def shard_name(rank: int, number: int) -> str:
    return f"features-{rank:05}-{number:05}.safetensors"


def manifest_name(rank: int) -> str:
    return f"manifest-{rank:05}.jsonl"


def errors_name(rank: int) -> str:
    return f"errors-{rank:05}.jsonl"


def part_name(offer: int, part: int) -> str:
    """The name of a file in which a part of a clip goes from one rank to another."""
    return f".part-{offer:05}-{part:05}.tmp"


def matching(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    """The files of `folder` whose whole name matches, sorted; none where there is no folder."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name))


class SourceImage(Protocol):
    """What a folder keeps of the source of an image, wherever that was listed."""

    @property
    def id(self) -> str: ...

    @property
    def path(self) -> str:
        """What messages call it."""
        ...

    @property
    def size(self) -> int:
        """In bytes; with `mtime`, what tells a changed image from an old one."""
        ...

    @property
    def mtime(self) -> float:
        """In seconds."""
        ...


@dataclass(frozen=True, slots=True)
class Entry:
    """One image in a manifest."""

    id: str
    shard: str  # file name
    grid_thw: tuple[int, int, int]
    tokens: int  # merged ones
    size: int  # of the source, in bytes
    mtime: float  # of the source, in seconds
    replaces: str | None = None  # the shard of the older entry that this one takes the place of
    crc32: str | None = None  # of the whole shard, in hex; None in folders of an older version
    times: tuple[float, ...] | None = None  # seconds, of the grid's frames; None of an image

    def line(self) -> str:
        record = {name: value for name, value in asdict(self).items() if value is not None}
        return json.dumps(record, separators=(",", ":")) + "\n"

    @classmethod
    def parse(cls, line: bytes | str) -> Entry:
        """ValueError where the line is no entry."""
        record = json.loads(line)
        if not isinstance(record, dict):
            raise ValueError(f"{record!r} is no object")
        values: dict[str, Any] = {name: record.get(name) for name in _TYPES}
        for name, value in values.items():
            if type(value) not in _TYPES[name]:
                raise ValueError(f"not an entry: {name} is {value!r}")
        grid = values["grid_thw"]
        if len(grid) != 3 or any(type(side) is not int for side in grid):
            raise ValueError(f"not an entry: grid_thw is {grid!r}")
        for shard in (values["shard"], values["replaces"]):
            if shard is not None and not SHARD_NAME.fullmatch(shard):
                raise ValueError(f"not an entry: {shard!r} names no shard")
        values["id"].encode()  # half a surrogate pair is no text, and no image's id
        for name in ("shard", "crc32"):  # the same for many images: in memory once
            values[name] = values[name] and intern(values[name])
        times = values["times"]
        if times is not None and any(type(time) not in (int, float) for time in times):
            raise ValueError(f"not an entry: times is {times!r}")
        return cls(**values | {"grid_thw": tuple(grid), "times": times and tuple(times)})


# As json.loads gives them: bool, though an int, is none here.
_TYPES: dict[str, tuple[type, ...]] = {
    "id": (str,),
    "shard": (str,),
    "grid_thw": (list,),
    "tokens": (int,),
    "size": (int,),
    "mtime": (float, int),
    "replaces": (str, type(None)),
    "crc32": (str, type(None)),
    "times": (list, type(None)),
}


@dataclass(slots=True)
class Damage:
    """The lines of a manifest that are no entries.

    A power cut can leave a last line without its end, or zeros where lines should be: torn ones,
    after every line that was flushed. Lines amid the entries have another cause.
    """

    whole: int = 0  # bytes up to the end of the last entry
    torn: int = 0  # lines after it
    amid: int = 0  # lines before it


def iter_manifest(path: Path, damage: Damage | None = None) -> Iterator[Entry]:
    """Every entry; lines that are none are counted in `damage`."""
    damage = damage or Damage()
    place = 0
    with path.open("rb") as file:
        for line in file:
            place += len(line)
            entry = _parse_whole(line)
            if entry is None:
                damage.torn += 1
                continue
            damage.amid += damage.torn
            damage.torn, damage.whole = 0, place
            yield entry


def _parse_whole(line: bytes) -> Entry | None:
    if not line.endswith(b"\n"):
        return None
    try:
        return Entry.parse(line)
    except (ValueError, RecursionError):
        return None


def manifests(folder: Path) -> list[Path]:
    """The manifests of all ranks, in their order."""
    return matching(folder, MANIFEST_NAME)


def check_any(folder: Path) -> None:
    """ValueError where `folder` is no output folder."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    if not manifests(folder):
        raise ValueError(
            f"{folder} holds no manifest-*.jsonl: not an output folder of vitrt encode"
        )


def entry_key(image_id: str, shard: str) -> int:
    """Stands for an entry in 64 bits, in this process: there may be tens of millions of them."""
    return hash((image_id, shard))


def live_entries(folder: Path) -> list[Entry]:
    """Every entry that no other one replaces, in the order of the manifests."""
    entries: list[Entry] = []
    for path in manifests(folder):
        damage = Damage()
        entries += iter_manifest(path, damage)
        if damage.amid:
            logger.warning(
                "%s: %s amid its entries that cannot be read; the next run into the folder "
                "encodes again what they stood for",
                path,
                counted(damage.amid, "line"),
            )
    dead = {entry_key(entry.id, entry.replaces) for entry in entries if entry.replaces}
    return [entry for entry in entries if entry_key(entry.id, entry.shard) not in dead]


def error_line(image_id: str, error_class: str, message: str) -> bytes:
    """One line of an errors file."""
    record: dict[str, Any] = {"id": image_id, "error": error_class, "message": message}
    return (json.dumps(record) + "\n").encode()
