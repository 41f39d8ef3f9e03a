"""Reads a whole output folder back and names everything in it that is not as a run leaves it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from vitrt.messages import counted
from vitrt.store.feature_shard import (
    file_crc32,
    kinds_of,
    merge_size_of,
    open_shard,
    parse_layers,
    read_header,
)
from vitrt.store.lock import running_job
from vitrt.store.manifest import (
    SHARD_NAME,
    TEMPORARY_NAME,
    Damage,
    Entry,
    check_any,
    iter_manifest,
    manifests,
    matching,
)
from vitrt.store.run_identity import RunIdentity
from vitrt.tensor_file import DTYPE_NAMES, Header, TensorFileError

_SHARED = RunIdentity.shared()  # what must be the same in every shard of a folder
_CODES = {str(dtype).removeprefix("torch."): code for dtype, code in DTYPE_NAMES.items()}
_OWN_DTYPES = {"pooled": "F32", "grid_thw": "I64"}  # of tensors that are not of the run's


@dataclass(slots=True)
class CheckResult:
    """What a check found."""

    images: int = 0
    tokens: int = 0
    shards: int = 0
    bytes: int = 0
    running: str | None = None  # the job that writes into the folder
    problems: list[str] = field(default_factory=list)
    unsummed: int = 0  # shards that an older version wrote, without a checksum

    def lines(self) -> Iterator[str]:
        """The result as lines for people."""
        yield from self.problems
        if self.running is not None:
            yield f"a job is writing into it ({self.running}): what it has begun was left out"
        if self.unsummed:
            yield (
                f"{counted(self.unsummed, 'shard')} without a checksum: a changed value that is "
                "still finite would not be found there"
            )
        verdict = counted(len(self.problems), "problem") if self.problems else "no problem"
        yield (
            f"{counted(self.images, 'image')}, {counted(self.tokens, 'token')}, "
            f"{counted(self.shards, 'shard')}, {self.bytes / (1 << 20):.1f} MiB: {verdict}"
        )


def check_folder(folder: str | Path) -> CheckResult:
    """Verify an output folder by reading every byte of it, one tensor at a time.

    Every shard must have its checksum, every manifest line its tensors, shapes fit grids, values be
    finite, no image be there twice, and nothing be there that no line names. While a job writes
    into the folder, what it has begun is no problem. Raises ValueError where `folder` is no output
    folder.
    """
    return _Check(Path(folder)).run()


class _Check:
    def __init__(self, folder: Path) -> None:
        check_any(folder)
        self.folder = folder
        self.result = CheckResult()
        self._seen: Counter[str] = Counter()
        self._begun: list[str] = []  # what is a problem unless a job runs
        self._replaced: set[str] = set()  # images
        self._listed: set[str] = set()
        self._shared: dict[str, str] | None = None
        self._layout: tuple[int, int] | None = None  # output width, deepstack levels

    def run(self) -> CheckResult:
        running = running_job(self.folder)
        for path in manifests(self.folder):
            self._manifest(path)
        self._twice()
        for path in matching(self.folder, SHARD_NAME):
            if path.name not in self._listed:
                self._begun.append(f"{path.name}: no manifest names it")
        for path in matching(self.folder, TEMPORARY_NAME):
            self._begun.append(f"{path.name}: a leftover of a run that was killed")
        self.result.running = running or running_job(self.folder)  # one may have begun since
        if self.result.running is None:
            self.result.problems += self._begun
        return self.result

    def _problem(self, text: str) -> None:
        self.result.problems.append(text)

    def _manifest(self, path: Path) -> None:
        damage = Damage()
        for name, group in groupby(iter_manifest(path, damage), key=lambda entry: entry.shard):
            entries = list(group)
            self._seen.update(entry.id for entry in entries)
            for entry in entries:
                if entry.replaces is not None:
                    self._replaced.add(entry.id)
                    self._begun.append(
                        f"{entry.id}: {entry.replaces} may still hold older features of it"
                    )
            if name in self._listed:
                self._problem(f"{name}: its images are listed in more than one place")
            self._listed.add(name)
            self._shard(name, entries)
        if damage.torn:
            self._begun.append(
                f"{path.name}: {counted(damage.torn, 'line')} at its end, torn or no entries"
            )
        if damage.amid:
            found = counted(damage.amid, "line")
            self._problem(f"{path.name}: {found} amid its entries, and no entry")

    def _twice(self) -> None:
        for image_id, times in self._seen.items():
            if times > 1:
                found = self._begun if image_id in self._replaced else self.result.problems
                found.append(f"{image_id}: listed {times} times")
        self.result.images = len(self._seen)

    def _shard(self, name: str, entries: list[Entry]) -> None:
        path = self.folder / name
        try:
            header = read_header(path)
            with open_shard(path) as shard:
                self._content(name, entries, header, shard)
            self._checksum(path, entries)
            self.result.bytes += path.stat().st_size
        except (TensorFileError, SafetensorError, OSError) as error:
            lost = "is lost" if len(entries) == 1 else "are lost"
            self._problem(f"{counted(len(entries), 'image')} of {name} {lost}: {error}")

    def _checksum(self, path: Path, entries: list[Entry]) -> None:
        listed = {entry.crc32 for entry in entries if entry.crc32 is not None}
        if not listed:
            self.result.unsummed += 1
        elif listed != {found := file_crc32(path)}:
            self._problem(
                f"{path.name}: its bytes have the CRC-32 {found}, its manifest lines say "
                f"{', '.join(sorted(listed))}: the file has changed since it was written; "
                "remove it, and the same vitrt encode encodes its images again"
            )

    def _content(self, name: str, entries: list[Entry], header: Header, shard: Any) -> None:
        self.result.shards += 1
        self._metadata(name, header)
        expected: set[str] = set()
        for entry in entries:
            expected |= self._image(entry, header, shard)
        for orphan in sorted(header.tensors.keys() - expected):
            self._problem(f"{name}: no manifest line for tensor {orphan!r}")

    def _metadata(self, name: str, header: Header) -> None:
        shared = {key: header.metadata.get(key, "") for key in _SHARED}
        if self._shared is None:
            self._shared = shared
        for key, value in shared.items():
            if value != self._shared[key]:
                self._problem(f"{name}: {key} is {value}, in other shards {self._shared[key]}")

    def _image(self, entry: Entry, header: Header, shard: Any) -> set[str]:
        """Check one image; the names of the tensors it should have."""
        merge = merge_size_of(header.metadata)
        t, h, w = entry.grid_thw
        if h % merge or w % merge or t * h * w != entry.tokens * merge**2:
            self._problem(f"{entry.id}: {entry.tokens} tokens do not fit the grid {t} x {h} x {w}")
        self.result.tokens += entry.tokens
        kinds = kinds_of(header.metadata)
        if "embeddings" in kinds and f"{entry.id}/deepstack" in header.tensors:
            kinds |= {"deepstack"}
        of_shard = _CODES.get(header.metadata.get("dtype", ""), "")
        names = {f"{entry.id}/{kind}": _OWN_DTYPES.get(kind, of_shard) for kind in sorted(kinds)}
        for tensor, dtype in names.items():
            if tensor not in header.tensors:
                self._problem(f"{entry.id}: {entry.shard} has no tensor {tensor!r}")
            elif header.tensors[tensor].dtype != dtype:
                found = header.tensors[tensor].dtype
                self._problem(f"{tensor}: its dtype is {found}, its shard says {dtype}")
        self._shapes(entry, header)
        self._values(entry, shard, header.tensors.keys() & names.keys())
        return set(names)

    def _shapes(self, entry: Entry, header: Header) -> None:
        def shape(kind: str) -> tuple[int, ...] | None:
            span = header.tensors.get(f"{entry.id}/{kind}")
            return None if span is None else span.shape

        pooled, embeddings, deepstack = map(shape, ("pooled", "embeddings", "deepstack"))
        if pooled is not None:
            found = pooled
            expected: tuple[int, ...] = (pooled[-1] if pooled else 0,)
        elif embeddings is not None:
            rows = 0 if header.metadata.get("merged") == "False" else entry.tokens
            found, expected = embeddings, (rows, embeddings[-1] if embeddings else 0)
        else:
            return  # reported as missing
        if found != expected:
            self._problem(f"{entry.id}: shape {list(found)}, its grid gives {list(expected)}")
            return
        levels = 0 if deepstack is None else deepstack[0]
        if deepstack is not None and deepstack != (levels, *expected):
            self._problem(
                f"{entry.id}: deepstack of shape {list(deepstack)} beside embeddings of shape "
                f"{list(expected)}"
            )
        self._hidden_shape(entry, header)
        if self._layout is None:
            self._layout = expected[-1], levels
        if self._layout != (expected[-1], levels):
            self._problem(
                f"{entry.id}: width {expected[-1]} with {levels} deepstack levels, other images "
                f"have {self._layout[0]} with {self._layout[1]}"
            )

    def _hidden_shape(self, entry: Entry, header: Header) -> None:
        span = header.tensors.get(f"{entry.id}/hidden")
        if span is None:
            return  # not asked for, or reported as missing
        width = span.shape[-1] if span.shape else 0
        expected = (len(parse_layers(header.metadata)), *entry.grid_thw, width)
        if span.shape != expected:
            self._problem(
                f"{entry.id}: hidden of shape {list(span.shape)}, its shard's layers and its grid "
                f"give {list(expected)}"
            )

    def _values(self, entry: Entry, shard: Any, names: Iterable[str]) -> None:
        for name in sorted(names):
            tensor = shard.get_tensor(name)
            if name == f"{entry.id}/grid_thw":
                if tensor.tolist() != list(entry.grid_thw):
                    self._problem(
                        f"{name}: {tensor.tolist()}, the manifest says {list(entry.grid_thw)}"
                    )
            elif not torch.isfinite(tensor).all():
                bad = int((~torch.isfinite(tensor)).sum())
                self._problem(f"{name}: {bad} of {tensor.numel()} values are NaN or infinite")
