"""An output folder as one table of ids and vectors, which vector databases read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from vitrt.store.durable import OutputError, partial_path
from vitrt.store.feature_store import FeatureStore

TableFormat = Literal["parquet", "lance"]


def export_vectors(
    folder: Path, kind: TableFormat, output: Path | None = None, *, overwrite: bool = False
) -> tuple[Path, int]:
    """Write `FeatureStore.arrow_batches` of a folder, all or nothing; where, and how many rows.

    `output` is `folder` with the format's suffix by default. ValueError where it exists and is not
    to be replaced, the folder holds nothing, or the format's package is missing.
    """
    target = output or folder.resolve().with_name(f"{folder.resolve().name}.{kind}")
    if target.exists() and not overwrite:
        raise ValueError(f"{target} exists: give another --output, or --overwrite to replace it")
    is_table = (target / "_versions").is_dir() if kind == "lance" else target.is_file()
    if target.exists() and not is_table:
        raise ValueError(f"{target} is no {kind} table: give another --output")
    if not target.absolute().parent.is_dir():
        raise ValueError(f"{target} lies in a folder that does not exist: give another --output")
    write = _writer(kind)
    batches = FeatureStore(folder).arrow_batches()
    first = next(batches)
    rows = 0

    def counted() -> Iterator[Any]:
        nonlocal rows
        for batch in chain([first], batches):
            rows += batch.num_rows
            yield batch

    temporary = partial_path(target)
    try:
        write(temporary, first.schema, counted())
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(temporary, target)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(temporary), str(target)):
            raise  # of a shard that is read
        raise OutputError("write", target, error) from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)
    return target, rows


def _writer(kind: TableFormat) -> Any:
    """What writes (path, schema, batches); ValueError, which says what to install, where none."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ValueError(f"export needs pyarrow: pip install 'vitrt[data]' ({error})") from None

    def to_parquet(path: Path, schema: Any, batches: Iterator[Any]) -> None:
        # Neither dictionaries nor compression find anything in such numbers.
        with (
            path.open("wb") as stream,  # of a path pyarrow might make a URL
            pq.ParquetWriter(stream, schema, use_dictionary=False, compression="none") as file,
        ):
            for batch in batches:
                file.write_batch(batch)

    if kind == "parquet":
        return to_parquet
    try:
        import lance
    except ImportError as error:
        raise ValueError(
            f"export --to lance needs pylance: pip install 'vitrt[lance]' ({error})"
        ) from None

    def to_lance(path: Path, schema: Any, batches: Iterator[Any]) -> None:
        reader = pa.RecordBatchReader.from_batches(schema, batches)
        lance.write_dataset(reader, str(path), mode="overwrite")

    return to_lance
