"""The output folder: FeatureWriter fills it shard by shard, FeatureStore reads it.

An image is in the folder once its manifest line is: the line is flushed to the disk only after the
whole shard is there under its final name.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from vitrt.features import ImageFeatures
from vitrt.store.durable import AppendError, OutputError, append, discard, write_file
from vitrt.store.feature_shard import (
    MERGE_SIZE,
    encode_shard,
    merge_size_of,
    parse_layers,
    read_header,
)
from vitrt.store.manifest import (
    Entry,
    RunIdentity,
    error_line,
    errors_name,
    live_entries,
    manifest_name,
    manifests,
    shard_name,
    temporary_path,
)

if TYPE_CHECKING:
    from vitrt.job.listing import Source

logger = logging.getLogger(__name__)

DEFAULT_SHARD_MIB = 256
SHARD_IMAGES = 1024  # most images of a shard: what a kill costs stays small where features are
_OPEN_SHARDS = 64  # kept mapped by a store


class FeatureWriter:
    """Writes features into one rank's shards. Not for several threads at once.

    A full shard is written by a thread while the next one fills; one at a time, in order. Nothing
    is durable before `flush`. An OutputError of that thread surfaces in the next call that needs
    it; the writer is closed for good then, and what it finished before stays valid.
    """

    def __init__(
        self,
        folder: Path,
        identity: RunIdentity,
        *,
        rank: int = 0,
        first_shard: int = 0,
        shard_mib: float = DEFAULT_SHARD_MIB,
        merge_size: int = MERGE_SIZE,
    ) -> None:
        """`folder` exists and was recovered; `first_shard` is this rank's first free number."""
        self.folder = folder
        self.rank = rank
        self.images = 0  # durable ones
        self._metadata = identity.metadata() | {"merge_size": str(merge_size)}
        self._next_shard = first_shard
        self._shard_bytes = shard_mib * (1 << 20)
        self._manifest = folder / manifest_name(rank)
        self._errors = folder / errors_name(rank)
        self._pool = identity.pool == "mean"
        self._held: list[tuple[Source, ImageFeatures, str | None]] = []
        self._held_ids: set[str] = set()
        self._held_bytes = 0
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        if not self._manifest.exists():
            write_file(self._manifest, [], temporary=temporary_path(self._manifest))

    def add(self, source: Source, features: ImageFeatures, *, replaces: str | None = None) -> None:
        """Take the features of one image, on the CPU; kept by reference until its shard is written.

        `replaces` names the shard that holds the features of an older state of the image. Of a run
        with `--pool mean` only `features.pooled()` is kept. A shard cannot hold two images of one
        id: the first is kept, the other one is recorded as an error.
        """
        if source.id in self._held_ids:
            message = f"{source.id}: {source.path} is a second image with this id"
            logger.warning("skipped: %s", message)
            self.add_error(source.id, "ValueError", message)
            return
        if self._pool:
            row = features.pooled()[None]
            features = ImageFeatures(row, None, features.grid_thw, features.merge_size)
        self._held.append((source, features, replaces))
        self._held_ids.add(source.id)
        self._held_bytes += features.embeddings.nbytes
        self._held_bytes += 0 if features.deepstack is None else features.deepstack.nbytes
        self._held_bytes += 0 if features.hidden is None else features.hidden.nbytes
        if self._held_bytes >= self._shard_bytes or len(self._held) >= SHARD_IMAGES:
            self._hand_over()

    def add_error(self, image_id: str, error_class: str, message: str) -> None:
        """Record an image that could not be encoded."""
        append(self._errors, error_line(image_id, error_class, message), flush=False)

    def flush(self) -> None:
        """Write and list everything added so far; durable on return."""
        self._hand_over()
        self.wait()
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Flush everything, the errors as well."""
        self.flush()
        if self._errors.exists():
            append(self._errors, b"", flush=True)

    def wait(self) -> None:
        """Until nothing is being written, whatever came of it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _hand_over(self) -> None:
        """Start writing the shard in hand, when the one before it is done."""
        self.wait()
        if self._failure is not None:
            raise self._failure
        if not self._held:
            return
        held, self._held, self._held_ids, self._held_bytes = self._held, [], set(), 0
        self._thread = threading.Thread(target=self._write, args=[held], name="vitrt-shard")
        self._thread.start()

    def _write(self, held: list[tuple[Source, ImageFeatures, str | None]]) -> None:
        try:
            self._write_shard(held)
        except BaseException as error:
            self._failure = error

    def _write_shard(self, held: list[tuple[Source, ImageFeatures, str | None]]) -> None:
        path = self.folder / shard_name(self.rank, self._next_shard)
        self._next_shard += 1
        shard = encode_shard(self._tensors(held), self._metadata)
        try:
            write_file(path, shard, temporary=temporary_path(path))
        except OutputError:
            discard(path)
            raise
        lines = "".join(
            Entry(
                source.id,
                path.name,
                features.grid_thw,
                tokens_of(features),
                source.size,
                source.mtime,
                replaces,
            ).line()
            for source, features, replaces in held
        )
        try:
            append(self._manifest, lines.encode(), flush=True)
        except AppendError as error:
            if error.undone:
                discard(path)  # not listed, so nobody would ever read it
            raise
        self.images += len(held)

    def _tensors(
        self, held: list[tuple[Source, ImageFeatures, str | None]]
    ) -> list[tuple[str, Tensor]]:
        if self._pool:
            return [(f"{source.id}/pooled", features.embeddings[0]) for source, features, _ in held]
        tensors = [
            (
                f"{source.id}/grid_thw",
                torch.tensor(features.grid_thw, dtype=torch.int64, device="cpu"),
            )
            for source, features, _ in held
        ]
        for source, features, _ in held:
            tensors.append((f"{source.id}/embeddings", features.embeddings.contiguous()))
            if features.deepstack is not None:
                tensors.append((f"{source.id}/deepstack", features.deepstack.contiguous()))
            if features.hidden is not None:
                tensors.append((f"{source.id}/hidden", features.hidden.contiguous()))
        return tensors


def tokens_of(features: ImageFeatures) -> int:
    """Merged tokens by the grid: pooled features hold only one row."""
    t, h, w = features.grid_thw
    return t * h * w // features.merge_size**2


class FeatureStore(Mapping[str, ImageFeatures]):
    """The features in an output folder, of all ranks, by image id. Read-only.

    Tensors are views of memory-mapped shards: opened on first use, read when touched. Of a run with
    `--pool mean`, `embeddings` is the one pooled row [1, out_hidden], so `pooled()` gives it back;
    `grid_thw` is the image's.
    """

    def __init__(self, folder: str | Path) -> None:
        """ValueError where `folder` is no output folder. Images written later need a new store.

        Unless a later run moved features while this store was open: then it reads the folder anew.
        """
        self.folder = Path(folder)
        if not manifests(self.folder):
            raise ValueError(
                f"{self.folder} holds no manifest-*.jsonl: not an output folder of vitrt encode"
            )
        self._entries = self._read_entries()
        self._open: OrderedDict[str, tuple[Any, frozenset[str]]] = OrderedDict()
        self._lock = threading.Lock()

    def _read_entries(self) -> dict[str, Entry]:
        entries: dict[str, Entry] = {}
        for entry in live_entries(self.folder):
            entries.setdefault(entry.id, entry)  # the first, as the next run will have it
        return entries

    def __getitem__(self, image_id: str) -> ImageFeatures:
        entry = self._entries[image_id]
        try:
            return self._read(entry)
        except FileNotFoundError:
            self._entries = self._read_entries()
            return self._read(self._entries[image_id])

    def _read(self, entry: Entry) -> ImageFeatures:
        image_id = entry.id
        shard, names = self._shard(entry.shard)
        metadata = self.metadata_of(entry.shard)
        merge_size = merge_size_of(metadata)
        if f"{image_id}/pooled" in names:
            row = shard.get_tensor(f"{image_id}/pooled")
            return ImageFeatures(row[None], None, entry.grid_thw, merge_size)
        deepstack, hidden = f"{image_id}/deepstack", f"{image_id}/hidden"
        return ImageFeatures(
            shard.get_tensor(f"{image_id}/embeddings"),
            shard.get_tensor(deepstack) if deepstack in names else None,
            entry.grid_thw,
            merge_size,
            shard.get_tensor(hidden) if hidden in names else None,
            parse_layers(metadata),
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, image_id: object) -> bool:
        return image_id in self._entries  # Mapping's own would read the features

    def __repr__(self) -> str:
        return f"FeatureStore({str(self.folder)!r}, {len(self)} images)"

    def __reduce__(self) -> tuple[type[FeatureStore], tuple[Path]]:
        return FeatureStore, (self.folder,)  # for the workers of a DataLoader

    def entry(self, image_id: str) -> Entry:
        """What the manifest says of an image: shard, grid, tokens, size and mtime of its source."""
        return self._entries[image_id]

    def metadata_of(self, shard: str) -> dict[str, str]:
        """A shard's own metadata: format, model, dtype, pixel limits, version."""
        metadata: dict[str, str] = self._shard(shard)[0].metadata()
        return metadata

    def pooled_tables(self) -> Iterator[tuple[list[str], Tensor]]:
        """Each shard's ids and its table [images, out_hidden], float32, mapped as a whole.

        Only of a run with `--pool mean`: ValueError where the folder holds whole features.
        """
        yield from self._tables(self._entries, again=True)

    def _tables(
        self, entries: Mapping[str, Entry], *, again: bool
    ) -> Iterator[tuple[list[str], Tensor]]:
        """`again`: where a shard is gone, look for its images in the shards of a later run."""
        shards: dict[str, list[str]] = {}
        for image_id, entry in entries.items():
            shards.setdefault(entry.shard, []).append(image_id)
        for shard, images in shards.items():
            wanted = set(images)
            try:
                ids, table = _table(self.folder / shard)
            except FileNotFoundError:
                if not again:
                    raise
                if any(name in self and self.entry(name).shard == shard for name in images):
                    self._entries = self._read_entries()
                moved = {name: self.entry(name) for name in images if name in self}
                yield from self._tables(moved, again=False)
                continue
            rows = [row for row, name in enumerate(ids) if name in wanted]
            yield ([ids[row] for row in rows], table if len(rows) == len(ids) else table[rows])

    def _shard(self, name: str) -> tuple[Any, frozenset[str]]:
        with self._lock:
            if name in self._open:
                self._open.move_to_end(name)
                return self._open[name]
            handle = safe_open(self.folder / name, framework="pt")
            self._open[name] = handle, frozenset(handle.keys())
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
            return self._open[name]


def _table(path: Path) -> tuple[list[str], Tensor]:
    size = path.stat().st_size
    header = read_header(path)
    spans = sorted(header.tensors.items(), key=lambda item: item[1].begin)
    if not all(name.endswith("/pooled") for name, _ in spans):
        raise ValueError(f"{path} holds whole features; tables come from vitrt encode --pool mean")
    data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    table = data[header.data_start :].view(torch.float32).view(len(spans), -1)
    return [name.removesuffix("/pooled") for name, _ in spans], table
