"""Ray Data: rows with images in, rows with features or an output folder out, by actors.

    dataset.map_batches(RayEncoder, fn_constructor_kwargs={"model": model},        # rows
                        compute=two_at_a_time(8), batch_size=1024, num_gpus=1)
    encode_dataset(dataset, model, "features", actors=8)   # a folder as `vitrt encode` writes it
    encode_parquet(dataset, model, "rows", actors=8)       # the rows in Parquet files

Ray reads, spreads and retries; an actor is one encoder, which packs its own batches by patches.
Imported by those who use Ray, and by nothing else in the package.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields
from hashlib import blake2b
from itertools import count
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray.data

from vitrt.integrations.ray_actor import EncoderActor, RayEncoder, RowBatch
from vitrt.integrations.ray_parquet import encode_parquet
from vitrt.integrations.ray_run import (
    DatasetRun,
    DatasetSummary,
    RunArguments,
    check_output,
    two_at_a_time,
)
from vitrt.job.encode import open_output
from vitrt.job.progress import Progress
from vitrt.job.run import encode_records
from vitrt.job.stop import Stop
from vitrt.messages import counted
from vitrt.sources.folder import shown
from vitrt.sources.record import Record
from vitrt.store.compaction import compact
from vitrt.store.content import from_bytes
from vitrt.store.durable import append
from vitrt.store.encoded_index import EncodedIndex
from vitrt.store.lock import FolderLock
from vitrt.store.manifest import error_line, errors_name, live_entries, manifest_name
from vitrt.store.recovery import recover
from vitrt.store.run_identity import RunIdentity
from vitrt.store.writer import FeatureWriter

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "DatasetSummary",
    "RayEncoder",
    "RunArguments",
    "encode_dataset",
    "encode_parquet",
    "from_bytes",
    "two_at_a_time",
]

_COUNTS = tuple(field.name for field in fields(DatasetSummary) if field.name != "doubled")

logger = logging.getLogger(__name__)


def encode_dataset(
    dataset: ray.data.Dataset,
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    **arguments: Unpack[RunArguments],
) -> DatasetSummary:
    """Encode every row that `output` does not hold yet into it, as `vitrt encode` writes a folder.

    A batch of rows is done when its features are on the disk, in shards of its own. One whose actor
    died is run again; in the end every image is there once. An image is taken as encoded by its id
    and size, and, where it is a path, its mtime. Of rows with one id one stays, which is logged,
    counted and named in errors-00000.jsonl.

    Args:
        output: a folder that all nodes share, of a file system with locks.
        arguments: see `RunArguments`.

    Raises:
        ValueError: about the model, or a folder of another run; nothing was written.
        ray.exceptions.RayError: what an actor raised; what was finished before stays valid.
    """
    check_output(output)
    run = DatasetRun(dataset, model, **arguments)
    folder = Path(output).resolve()
    dropped: list[tuple[str, str]] = []
    totals = dict.fromkeys(_COUNTS, 0)
    hashes: list[np.ndarray] = []
    with open_output(folder, run.identity, overwrite=run.options.overwrite):
        for call in run.rows_of(_FolderEncoder, folder=folder).iter_rows():
            dropped += [tuple(pair) for pair in call["dropped"]]
            totals = {name: total + int(call[name]) for name, total in totals.items()}
            hashes.append(np.array(call["ids"], dtype=np.int64))
        recover(folder, keep_errors=True)  # after actors that died, and batches that ran twice
        compact(folder, dropped)
        doubled = _say_doubled(folder, hashes)
    return DatasetSummary(**totals, doubled=doubled)


def _id_hash(image_id: str) -> int:
    """What the driver keeps of an id: eight bytes, of each row."""
    return int.from_bytes(blake2b(image_id.encode(), digest_size=8).digest(), "big", signed=True)


def _say_doubled(folder: Path, hashes: list[np.ndarray]) -> int:
    """Log and list the ids in the folder that several rows had; how many rows too many."""
    found, times = np.unique(np.concatenate([*hashes, np.zeros(0, np.int64)]), return_counts=True)
    doubled = dict(zip(found[times > 1].tolist(), times[times > 1].tolist(), strict=True))
    if not doubled:
        return 0
    names = {entry.id: doubled.get(_id_hash(entry.id)) for entry in live_entries(folder)}
    kept = {name: rows for name, rows in names.items() if rows is not None}
    if not kept:  # none of them could be encoded, which was said of each
        return 0
    said = {
        name: f"{shown(name)}: {rows} rows have this id, and one was kept"
        for name, rows in kept.items()
    }
    lines = [error_line(name, "ValueError", message) for name, message in said.items()]
    append(folder / errors_name(0), b"".join(lines), flush=True)
    few = "; ".join(list(said.values())[:5])
    logger.warning("%s of several rows: %s", counted(len(kept), "id"), few)
    return sum(kept.values()) - len(kept)


class _FolderEncoder(EncoderActor):
    """Rows in; their features into the folder, and one row that counts them out."""

    def __init__(self, folder: Path, identity: RunIdentity, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._folder, self._identity = folder, identity
        self._encoded = EncodedIndex(folder)
        self._idle: list[FeatureWriter] = []  # each has a rank, and serves one call at a time
        # One of two calls has the device: at half its rate each, both would begin and end together,
        # and it would wait for the first images of both, and then for the disk.
        self._turn = Lock()

    def __call__(self, batch: RowBatch) -> pa.Table:
        hashes: list[int] = []

        def records() -> Iterator[Record]:
            for record in self._records(batch):
                if record.problem is None:
                    hashes.append(_id_hash(record.id))
                yield record

        writer = self._take_writer()
        progress = Progress()
        with FolderLock(self._folder, writer.rank):  # another job finds the folder busy
            outcome = encode_records(
                self._stages,
                records(),
                writer,
                self._encoded,
                progress=progress,
                stop=Stop(),
                workers=self._options.workers,
                on_error=self._options.on_error,
                turn=self._turn,
            )
        self._idle.append(writer)
        state = progress.snapshot()
        counts = [pa.array([getattr(state, name)]) for name in _COUNTS]
        pairs = pa.array([list(map(list, outcome.dropped))], pa.list_(pa.list_(pa.string())))
        ids = pa.array([hashes], pa.list_(pa.int64()))
        return pa.table([*counts, pairs, ids], [*_COUNTS, "dropped", "ids"])

    def _take_writer(self) -> FeatureWriter:
        with suppress(IndexError):
            return self._idle.pop()
        return FeatureWriter(
            self._folder,
            self._identity,
            rank=_claim_rank(self._folder),
            shard_mib=self._options.shard_mib,
            merge_size=self._merge_size,
        )


def _claim_rank(folder: Path) -> int:
    """A rank that no actor has had: the manifest of a dead one may end within a line."""
    for rank in count(1):
        with suppress(FileExistsError):
            (folder / manifest_name(rank)).open("xb").close()
            return rank
    raise AssertionError
