"""FeatureStore: reads an output folder, of whatever size, image by image or shard by shard."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitrt.features import ImageFeatures
from vitrt.messages import counted
from vitrt.store.feature_shard import merge_size_of, open_shard, parse_layers, read_header
from vitrt.store.manifest import Entry, check_any, live_entries
from vitrt.tensor_file import TensorFileError

_OPEN_SHARDS = 64  # kept mapped


class FeatureStore(Mapping[str, ImageFeatures]):
    """The features in an output folder, of all ranks, by image id. Read-only.

    Tensors are views of memory-mapped shards: opened on first use, read when touched. Writing into
    one never reaches the file, but who reads the image again sees it. Of a run with `--pool mean`,
    `embeddings` is the one pooled row [1, out_hidden], so `pooled()` gives it back; `grid_thw` is
    the image's. A shard that was damaged since is a ValueError that names it.
    """

    def __init__(self, folder: str | Path) -> None:
        """ValueError where `folder` is no output folder.

        Images written later need a new store, unless this one has to read the folder anew because a
        later run moved features.
        """
        self.folder = Path(folder)
        check_any(self.folder)
        self._open: OrderedDict[str, tuple[Any, frozenset[str]]] = OrderedDict()
        self._lock = threading.Lock()
        self._refresh()

    def _refresh(self) -> None:
        entries: dict[str, Entry] = {}
        for entry in live_entries(self.folder):
            entries.setdefault(entry.id, entry)  # the first, as the next run will have it
        with self._lock:
            self._entries = entries
            self._open.clear()  # entries and shards of one moment: none of a folder that is gone

    def __getitem__(self, image_id: str) -> ImageFeatures:
        entry = self._entries[image_id]
        try:
            return self._read(entry)
        except FileNotFoundError:
            self._refresh()
            return self._read(self._entries[image_id])

    def _read(self, entry: Entry) -> ImageFeatures:
        shard, names = self._shard(entry.shard)
        metadata = self.metadata_of(entry.shard)
        merge_size = merge_size_of(metadata)

        def tensor(kind: str) -> Tensor | None:
            name = f"{entry.id}/{kind}"
            found: Tensor | None = shard.get_tensor(name) if name in names else None
            return found

        if (row := tensor("pooled")) is not None:
            return ImageFeatures(row[None], None, entry.grid_thw, merge_size, times=entry.times)
        if (embeddings := tensor("embeddings")) is None:
            raise TensorFileError(
                f"{self.folder / entry.shard} has no features of {entry.id!r}, which the manifest "
                f"says it holds: vitrt check {self.folder} says what else is wrong"
            )
        return ImageFeatures(
            embeddings,
            tensor("deepstack"),
            entry.grid_thw,
            merge_size,
            tensor("hidden"),
            parse_layers(metadata),
            entry.times,
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, image_id: object) -> bool:
        return image_id in self._entries  # Mapping's own would read the features

    def __repr__(self) -> str:
        return f"FeatureStore({str(self.folder)!r}, {counted(len(self), 'image')})"

    def __reduce__(self) -> tuple[type[FeatureStore], tuple[Path]]:
        return FeatureStore, (self.folder,)  # for the workers of a DataLoader

    def entry(self, image_id: str) -> Entry:
        """What the manifest says of an image: shard, grid, tokens, size and mtime of its source."""
        return self._entries[image_id]

    def metadata_of(self, shard: str) -> dict[str, str]:
        """A shard's own metadata: format, model, dtype, pixel limits, version."""
        return self._shard(shard)[0].metadata() or {}

    def pooled_tables(self) -> Iterator[tuple[list[str], Tensor]]:
        """Each shard's ids and its table [images, out_hidden], float32, mapped as a whole.

        Only of a run with `--pool mean`: ValueError where the folder holds whole features.
        """
        yield from self._tables(self._entries, again=True)

    def to_arrow(self) -> Any:
        """A pyarrow.Table of `id` and `vector`: pooled features, a list of out_hidden float32.

        All in memory: `arrow_batches` gives it in parts.
        """
        import pyarrow as pa

        return pa.Table.from_batches(self.arrow_batches())

    def arrow_batches(self) -> Iterator[Any]:
        """`to_arrow` in parts, a pyarrow.RecordBatch for each shard. Whole features are pooled.

        The schema's metadata are the shard's: model, dtype, pixel limits. ValueError where the
        folder holds no image.
        """
        import pyarrow as pa

        if not self._entries:
            raise ValueError(f"{self.folder} holds no image")
        metadata = self.metadata_of(next(iter(self._entries.values())).shard)
        for ids, vectors in self._vectors(pooled=metadata.get("pool") == "mean"):
            column = pa.FixedSizeListArray.from_arrays(
                pa.array(vectors.contiguous().view(-1).numpy()), vectors.shape[1]
            )
            batch = pa.record_batch([pa.array(ids, pa.string()), column], ["id", "vector"])
            yield batch.replace_schema_metadata(metadata)

    def _vectors(self, *, pooled: bool) -> Iterator[tuple[list[str], Tensor]]:
        """Each shard's ids and pooled vectors [images, out_hidden], float32."""
        if pooled:
            yield from self.pooled_tables()
            return
        for _, entries in groupby(list(self._entries.values()), key=lambda entry: entry.shard):
            ids = [entry.id for entry in entries]
            yield ids, torch.stack([self[image_id].pooled() for image_id in ids])

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
                    self._refresh()
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
            handle = open_shard(self.folder / name)
            self._open[name] = handle, frozenset(handle.keys())
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
            return self._open[name]


def _table(path: Path) -> tuple[list[str], Tensor]:
    path.stat()  # FileNotFoundError
    header = read_header(path)
    spans = sorted(header.tensors.items(), key=lambda item: item[1].begin)
    if not all(name.endswith("/pooled") for name, _ in spans):
        raise ValueError(f"{path} holds whole features; tables come from vitrt encode --pool mean")
    # Mapped privately. torch.from_file would do, but takes names in UTF-8 alone.
    data = torch.from_numpy(np.memmap(path, dtype=np.uint8, mode="c"))
    table = data[header.data_start :].view(torch.float32).view(len(spans), -1)
    return [name.removesuffix("/pooled") for name, _ in spans], table
