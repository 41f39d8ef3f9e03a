"""The images in the rows of Parquet files and of Hugging Face datasets on disk (Arrow streams).

A column holds the bytes of image files, or structs of `bytes` and `path` as `datasets` writes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from vitrt.sources.folder import id_from
from vitrt.sources.location import state_of
from vitrt.sources.options import SourceOptions
from vitrt.sources.record import Record
from vitrt.sources.row_reader import open_rows


def image_column(location: str, options: SourceOptions) -> str:
    """The column with images; ValueError where there is none, or no telling which."""
    with open_rows(location) as (schema, _):
        names = [field.name for field in schema if _holds_images(field.type)]
        if options.id_column is not None and options.id_column not in schema.names:
            raise ValueError(
                f"it has no column {options.id_column!r}, but {', '.join(schema.names)}"
            )
        if options.image_column is not None:
            if options.image_column not in names:
                raise ValueError(
                    f"{options.image_column!r} is no column of bytes or of structs with `bytes`; "
                    f"such are: {', '.join(names) or 'none'}"
                )
            return options.image_column
        if len(names) == 1 or "image" in names:
            return names[0] if len(names) == 1 else "image"
        if not names:
            kinds = ", ".join(f"{field.name} ({field.type})" for field in schema)
            raise ValueError(f"no column holds bytes or structs with `bytes`: {kinds}")
        raise ValueError(f"--image-column must say which to take: {', '.join(names)}")


def row_records(
    location: str, prefix: str, options: SourceOptions, should_stop: Callable[[], bool]
) -> Iterator[Record]:
    """A record for each row of a file, with ids `prefix`/number or as a column gives them.

    Size and mtime are the file's: no row is read to list it.
    """
    size, mtime = state_of(location)
    column, number = image_column(location, options), 0
    with open_rows(location) as (_, runs):
        for run, (rows, batches) in enumerate(runs):
            ids = _ids(batches, options.id_column) if options.id_column else iter([None] * rows)
            for row, value in enumerate(ids):
                if should_stop():
                    return
                path, problem = f"{location}, row {number}", None
                name = f"{prefix}/{number}" if options.id_column is None else str(value)
                if options.id_column and (not isinstance(value, str | int) or value == ""):
                    name = f"{prefix}/{number}"
                    problem = f"its {options.id_column} is {value!r}, which is no id"
                place = ("row", location, run, row, column)
                yield Record(id_from(name), path, size, mtime, problem, place)
                number += 1


def _ids(batches: Callable[[str], Iterator[Any]], column: str) -> Iterator[Any]:
    for batch in batches(column):
        yield from batch.to_pylist()


def _holds_images(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_struct(kind):
        return any(field.name == "bytes" and _holds_images(field.type) for field in kind)
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))
