"""Writes images into tars, Parquet files, datasets on disk and memory://."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq


def write_tar(images: Mapping[str, bytes], path: Path) -> Path:
    """Each with a text of its own beside it, as WebDataset's samples have."""
    with tarfile.open(path, "w") as archive:
        for name, data in images.items():
            key = name.rpartition(".")[0]
            for member, content in ((name, data), (f"{key}.txt", b"a caption")):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


def table_of(images: Mapping[str, bytes | None], *, structs: bool = False) -> pa.Table:
    """A column `image`, of bytes or as `datasets` writes it, and one of names."""
    column: Iterable[Any] = images.values()
    kind: Any = pa.binary()
    if structs:
        column = [{"bytes": data, "path": name} for name, data in images.items()]
        kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    return pa.table({"image": pa.array(column, kind), "name": pa.array(images, pa.string())})


def write_parquet(
    images: Mapping[str, bytes | None], path: Path, *, structs: bool = False, rows: int = 1000
) -> Path:
    pq.write_table(table_of(images, structs=structs), path, row_group_size=rows)
    return path


def write_dataset(images: Mapping[str, bytes | None], folder: Path) -> Path:
    """As `datasets.Dataset.save_to_disk` lays it out."""
    folder.mkdir(exist_ok=True, parents=True)
    name = "data-00000-of-00001.arrow"
    table = table_of(images, structs=True)
    with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
        out.write_table(table, max_chunksize=4)
    state = {"_data_files": [{"filename": name}], "_fingerprint": "0", "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def write_remote(images: Mapping[str, bytes], url: str, name: str = "") -> str:
    """Below a URL; the URL, or that of one of them."""
    system, path = fsspec.core.url_to_fs(url)
    for each, data in images.items():
        system.pipe(f"{path}/{each}", data)
    return f"{url}/{name}" if name else url
