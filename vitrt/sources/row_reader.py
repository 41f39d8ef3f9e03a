"""Opens Parquet files and Arrow streams, and reads single values of a column of theirs.

Rows are read forward, a few megabytes at a time: several ranks each read what lies between theirs.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from vitrt.messages import one_line
from vitrt.sources.location import is_url, open_location

_BATCH_ROWS = 64
_KEPT_BATCHES = 16  # before the newest, for threads that are late
_KEPT_SINGLE = 64  # where a batch is one row
_OPEN_RUNS = 4
_PAGE_BYTES = 1 << 20  # read at once: a row group may be the whole file


@contextmanager
def open_rows(location: str) -> Iterator[tuple[Any, Iterator[tuple[int, Callable[..., Any]]]]]:
    """A file's schema, and of each run of its rows how many it has and its batches of a column.

    A run is a row group of a Parquet file, or a whole Arrow stream.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ValueError(f"reading it needs pyarrow: pip install 'vitrt[data]' ({error})") from None
    # Files of pyarrow's own are faster, and take paths in UTF-8 alone. Given a path in their place,
    # ParquetFile reads a:b as a URL.
    own = not is_url(location) and one_line(location) == location
    if not location.lower().endswith(".arrow"):
        with (
            pa.OSFile(location) if own else open_location(location) as stream,
            pq.ParquetFile(stream, buffer_size=_PAGE_BYTES) as file,
        ):
            yield file.schema_arrow, _row_groups(file)
        return
    with pa.memory_map(location) if own else open_location(location) as stream:
        reader = pa.ipc.open_stream(stream)
        yield reader.schema, _whole(reader)


def _row_groups(file: Any) -> Iterator[tuple[int, Callable[..., Iterator[Any]]]]:
    for group in range(file.num_row_groups):

        def batches(column: str, rows: int = _BATCH_ROWS, group: int = group) -> Iterator[Any]:
            found = file.iter_batches(rows, row_groups=[group], columns=[column])
            return (batch.column(0) for batch in found)

        yield file.metadata.row_group(group).num_rows, batches


def _whole(reader: Any) -> Iterator[tuple[int, Callable[..., Iterator[Any]]]]:
    """The only run of a stream, read as a whole: its length is known at its end alone."""
    table = reader.read_all()  # mapped, not read, where the file is on this machine
    yield (
        table.num_rows,
        lambda column, rows=_BATCH_ROWS: (
            batch.column(0) for batch in table.select([column]).to_batches(max_chunksize=rows)
        ),
    )


class _Run:
    """A run of rows read forward, a batch at a time, for threads that ask in about that order."""

    def __init__(self, location: str, number: int, column: str) -> None:
        self.lock = threading.Lock()
        self._context = open_rows(location)
        _, runs = self._context.__enter__()
        self._batches = next(batches for run, (_, batches) in enumerate(runs) if run == number)
        self._column = column
        self._kept: deque[Any] = deque()
        self._rows = _BATCH_ROWS
        self._restart()

    def _restart(self) -> None:
        self._rest = self._batches(self._column, self._rows)
        self._kept.clear()
        self._first = self._end = 0
        self._damage: Exception | None = None

    def value(self, row: int) -> Any:
        """The value of a row in this run; the caller holds the lock."""
        if row < self._first:
            self._restart()
        while row >= self._end:
            if self._damage is not None:
                # How many rows the lost page had is not told, so not which row comes next either.
                raise ValueError(f"it is damaged before this row: {self._damage}")
            try:
                batch = next(self._rest, None)
            except Exception as error:  # pyarrow's, of many kinds
                if self._rows == 1:
                    self._damage = error
                    raise
                self._rows = 1  # again, for the rows of this batch before the damage
                self._restart()
                continue
            if batch is None:
                raise ValueError(f"it has {self._end} rows: the file has changed")
            self._kept.append(batch)
            self._end += len(batch)
            if len(self._kept) > (_KEPT_BATCHES if self._rows > 1 else _KEPT_SINGLE):
                self._first += len(self._kept.popleft())
        start = self._first
        for batch in self._kept:
            if row < start + len(batch):
                return batch[row - start].as_py()
            start += len(batch)
        raise AssertionError(row)


_runs: OrderedDict[tuple[Any, ...], _Run] = OrderedDict()
_runs_lock = threading.Lock()


def load_row(
    location: str, run: int, row: int, column: str, state: tuple[int, float]
) -> str | bytes:
    """The image in a row: its bytes, or the path of a file where a struct holds that alone.

    What was opened in another `state` of the file, its size and mtime, is not read on.
    """
    key = (location, run, column, state)
    with _runs_lock:
        if key not in _runs:
            _runs[key] = _Run(location, run, column)
            if len(_runs) > _OPEN_RUNS:
                _runs.popitem(last=False)
        _runs.move_to_end(key)
        opened = _runs[key]
    with opened.lock:
        value = opened.value(row)
    if isinstance(value, dict):
        path, value = value.get("path"), value["bytes"]
        if value is None and path:
            return os.path.join(os.path.dirname(location), path)
    if value is None:
        raise ValueError(f"column {column} is null")
    return bytes(value)
