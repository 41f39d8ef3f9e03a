"""The records beside the shards: which image lies where, and what the run was that made it.

A manifest is a log, appended to and flushed shard by shard. An entry that names in `replaces` the
shard of an older entry of the same image takes its place, whichever manifests the two are in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from vitrt.store.feature_shard import FORMAT
from vitrt.version import __version__

SHARD_NAME = re.compile(r"features-(\d{5})-(\d{5,})\.safetensors")
MANIFEST_NAME = re.compile(r"manifest-(\d{5})\.jsonl")
ERRORS_NAME = re.compile(r"errors-(\d{5})\.jsonl")
TEMPORARY_NAME = re.compile(r"\.(features|manifest)-[\d-]+\.tmp")

NO_LAYERS = "none"


def shard_name(rank: int, number: int) -> str:
    return f"features-{rank:05}-{number:05}.safetensors"


def manifest_name(rank: int) -> str:
    return f"manifest-{rank:05}.jsonl"


def errors_name(rank: int) -> str:
    return f"errors-{rank:05}.jsonl"


def temporary_path(path: Path) -> Path:
    """Where `path` is written before it is renamed; hidden, and recognised as a leftover."""
    return path.with_name(f".{path.name.split('.')[0]}.tmp")


def matching(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    """The files of `folder` whose whole name matches, sorted; none where there is no folder."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name))


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

    def line(self) -> str:
        record = asdict(self)
        if self.replaces is None:
            del record["replaces"]
        return json.dumps(record, separators=(",", ":")) + "\n"

    @classmethod
    def parse(cls, line: bytes | str) -> Entry:
        """ValueError where the line is no entry."""
        record = json.loads(line)
        if not isinstance(record, dict):
            raise ValueError(f"{record!r} is no object")
        try:
            grid = tuple(record["grid_thw"])
            entry = cls(
                **{f.name: record[f.name] for f in fields(cls) if f.default is not None},
                replaces=record.get("replaces"),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not an entry: {error!r}") from error
        typed = isinstance(entry.id, str) and isinstance(entry.shard, str)
        if not typed or not SHARD_NAME.fullmatch(entry.shard) or len(grid) != 3:
            raise ValueError("not an entry: id, shard or grid_thw has another form")
        object.__setattr__(entry, "grid_thw", grid)
        return entry


def iter_manifest(path: Path) -> Iterator[Entry]:
    """Every entry up to the first line that is none (see `torn_from`)."""
    with path.open("rb") as file:
        for line in file:
            entry = _parse_whole(line)
            if entry is None:
                return
            yield entry


def torn_from(path: Path) -> tuple[int, int]:
    """(bytes that hold whole entries, lines behind them).

    A power cut can leave a last line without its end, or zeros where lines should be; both are
    behind every line that was flushed.
    """
    valid = 0
    with path.open("rb") as file:
        for line in file:
            if _parse_whole(line) is None:
                return valid, 1 + sum(1 for _ in file)
            valid += len(line)
    return valid, 0


def _parse_whole(line: bytes) -> Entry | None:
    if not line.endswith(b"\n"):
        return None
    try:
        return Entry.parse(line)
    except ValueError:
        return None


def manifests(folder: Path) -> list[Path]:
    """Those of all ranks, in their order."""
    return matching(folder, MANIFEST_NAME)


def superseded(folder: Path) -> set[tuple[str, str]]:
    """(id, shard) of every entry that a later one replaces."""
    return {
        (entry.id, entry.replaces)
        for path in manifests(folder)
        for entry in iter_manifest(path)
        if entry.replaces is not None
    }


def live_entries(folder: Path) -> Iterator[Entry]:
    """Every entry that no other one replaces, in the order of the manifests."""
    dead = superseded(folder)
    for path in manifests(folder):
        for entry in iter_manifest(path):
            if (entry.id, entry.shard) not in dead:
                yield entry


@dataclass(frozen=True, slots=True)
class RunIdentity:
    """What two runs must share to write into one folder. Saved in the metadata of every shard."""

    model: str  # as the user named it
    model_type: str
    weights: str  # a fingerprint of the checkpoint: a model may move, but not change
    dtype: str
    min_pixels: int
    max_pixels: int
    resize: str
    pool: str
    layers: str = NO_LAYERS  # whose hidden states are kept, from 0
    merged: bool = True  # whether merged tokens are

    def metadata(self) -> dict[str, str]:
        """The strings saved with a shard, format and version included."""
        values = {name: str(value) for name, value in asdict(self).items()}
        return {"format": FORMAT, **values, "vitrt_version": __version__}

    def differences(self, metadata: Mapping[str, str]) -> list[str]:
        """One text for each thing in which the run behind `metadata` was another."""
        mine = self.metadata()
        # A shard that does not name a setting is older than it.
        theirs = {f.name: str(f.default) for f in fields(self) if f.default is not MISSING}
        theirs |= metadata
        names = [f.name for f in fields(self) if f.name not in ("model", "weights")]
        found = [
            f"{name} is {theirs[name]} there and {mine[name]} now"
            for name in names
            if name in theirs and theirs[name] != mine[name]
        ]
        if metadata.get("weights", self.weights) != self.weights:
            same_name = metadata.get("model") == self.model
            found.insert(
                0,
                f"the weights of model {self.model} changed since"
                if same_name
                else f"model is {metadata.get('model')} there and {self.model} now",
            )
        return found


def layers_text(layers: Sequence[int]) -> str:
    """Layers as a shard's metadata and a RunIdentity say them."""
    return ",".join(map(str, layers)) or NO_LAYERS


def parse_layers(metadata: Mapping[str, str]) -> tuple[int, ...]:
    """The layers whose hidden states a shard holds, in their order."""
    text = metadata.get("layers", NO_LAYERS)
    return () if text == NO_LAYERS else tuple(map(int, text.split(",")))


def error_line(image_id: str, error_class: str, message: str) -> bytes:
    """One line of an errors file."""
    record: dict[str, Any] = {"id": image_id, "error": error_class, "message": message}
    return (json.dumps(record) + "\n").encode()
