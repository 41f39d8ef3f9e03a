"""Rows of features as Parquet files, resumed by id."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
from pyarrow import fs

from vitrt.integrations.ray_actor import RayEncoder, RowBatch
from vitrt.integrations.ray_run import DatasetRun, DatasetSummary, RunArguments, check_output
from vitrt.store.run_identity import RunIdentity

if TYPE_CHECKING:
    from typing_extensions import Unpack

logger = logging.getLogger(__name__)


def encode_parquet(
    dataset: ray.data.Dataset,
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    **arguments: Unpack[RunArguments],
) -> DatasetSummary:
    """Write RayEncoder's rows of every id that the files in `output` do not hold yet.

    An id that is there counts as done, even if its row holds an error. A file that a killed run
    left unfinished is removed first. Only one run may write into `output` at a time.

    Args:
        output: a folder that all nodes share, or a URL of pyarrow's (s3://, gs://).
        arguments: see `RunArguments`; `options.overwrite` removes the files first.

    Raises:
        ValueError: about the model, or files of another run; nothing was written.
        ray.exceptions.RayError: what an actor raised; what was finished before stays.
    """
    check_output(output)
    run = DatasetRun(dataset, model, **arguments)
    files = _Files.of(output)
    if run.options.overwrite:
        files.remove()
    before = files.held([run.id_column], run.identity)
    done = ray.put(before.column(run.id_column)) if before.num_rows else None
    encoded = run.rows_of(_ParquetEncoder, done=done)
    encoded.write_parquet(files.path, filesystem=files.system)
    rows = files.held(["tokens", "error"], run.identity, but=files.names)
    skipped = rows.num_rows - rows.column("error").null_count
    tokens = sum(rows.column("tokens").drop_null().to_pylist())
    return DatasetSummary(rows.num_rows - skipped, tokens, skipped, before.num_rows)


class _ParquetEncoder(RayEncoder):
    """Leaves out what is done, and says in the metadata which run its rows are of."""

    def __init__(self, done: ray.ObjectRef | None, identity: RunIdentity, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._done = frozenset(() if done is None else ray.get(done).to_pylist())
        self._metadata = identity.metadata()

    def __call__(self, batch: RowBatch) -> Iterator[pa.Table]:
        ids = self.ids(batch)
        left = [place for place, image_id in enumerate(ids) if image_id not in self._done]
        for table in super().__call__({name: column[left] for name, column in batch.items()}):
            yield table.replace_schema_metadata(self._metadata)


@dataclass(slots=True)
class _Files:
    """The Parquet files of a folder."""

    system: fs.FileSystem
    path: str
    names: frozenset[str] = field(default_factory=frozenset)  # that `held` has read

    @classmethod
    def of(cls, output: str | os.PathLike[str]) -> _Files:
        text = os.fspath(output)
        if "://" in text:
            return cls(*fs.FileSystem.from_uri(text))
        return cls(fs.LocalFileSystem(), os.path.abspath(text))

    def _list(self) -> list[str]:
        found = self.system.get_file_info(fs.FileSelector(self.path, allow_not_found=True))
        return sorted(info.path for info in found if info.path.endswith(".parquet"))

    def remove(self) -> None:
        """Remove all of them; ValueError, before any is removed, where one is of another origin."""
        paths = self._list()
        for path in paths:
            with suppress(pa.ArrowInvalid), pq.ParquetFile(path, filesystem=self.system) as file:
                _metadata(path, file.schema_arrow)
        for path in paths:
            self.system.delete_file(path)

    def held(
        self, columns: list[str], identity: RunIdentity, but: frozenset[str] = frozenset()
    ) -> pa.Table:
        """These columns of all files but some; a file that is not whole is removed.

        ValueError where a file is of another run, or has no such column.
        """
        tables = []
        for path in self._list():
            if path in but:
                continue
            try:
                file = pq.ParquetFile(path, filesystem=self.system)
            except pa.ArrowInvalid as error:
                logger.warning("removing %s, which a run left unfinished: %s", path, error)
                self.system.delete_file(path)
                continue
            with file:
                self._check(path, file.schema_arrow, columns, identity)
                tables.append(file.read(columns=columns))
            self.names |= {path}
        empty = pa.table({name: pa.nulls(0) for name in columns})
        return pa.concat_tables([*tables] or [empty], promote_options="permissive")

    def _check(
        self, path: str, schema: pa.Schema, columns: list[str], identity: RunIdentity
    ) -> None:
        metadata = _metadata(path, schema)
        if not set(columns) <= set(schema.names):
            raise ValueError(
                f"{path} has no columns {', '.join(columns)}, but {', '.join(schema.names)}: "
                "choose another output"
            )
        if differences := identity.differences(metadata):
            raise ValueError(
                f"{path} is of another run: {'; '.join(differences)}. Choose another output, or "
                "overwrite"
            )


def _metadata(path: str, schema: pa.Schema) -> dict[str, str]:
    """The metadata of a file, which name its run. ValueError for one of another origin."""
    metadata = {
        key.decode(errors="replace"): value.decode(errors="replace")
        for key, value in (schema.metadata or {}).items()
    }
    if "format" not in metadata or "vitrt_version" not in metadata:
        raise ValueError(f"{path} was not written by encode_parquet: choose another output")
    return metadata
