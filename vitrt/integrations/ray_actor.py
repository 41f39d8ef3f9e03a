"""An encoder as an actor of Ray's, and rows of features out of rows with images."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch

from vitrt.checkpoint.opened import Checkpoint, open_checkpoint
from vitrt.config import RuntimeConfig
from vitrt.engine.pipeline import Pipeline
from vitrt.integrations.row_records import row_record
from vitrt.job.encode import load_encoder, stages_of
from vitrt.job.options import EncodeOptions
from vitrt.job.run import prepare_with
from vitrt.job.to_host import OnHost, ToHost, Transfer
from vitrt.sources.record import Record
from vitrt.store.content import to_bytes
from vitrt.store.writer import tokens_of

RowBatch = Mapping[str, np.ndarray]
Result = tuple[int, "OnHost | Exception"]

_TABLE_BYTES = 32 << 20  # of features in one piece of a batch's rows


class EncoderActor:
    """One encoder, and the records in a batch of rows."""

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        image_column: str = "image",
        id_column: str = "id",
        options: EncodeOptions | None = None,
        runtime: RuntimeConfig | None = None,
        adapter: str | os.PathLike[str] | None = None,
        revision: str | None = None,
    ) -> None:
        self._options = options or EncodeOptions()
        self._columns = id_column, image_column
        runtime = runtime or RuntimeConfig()
        checkpoint = open_run_model(model, runtime, adapter, revision)
        limit_memory()
        encoder = load_encoder(checkpoint, runtime, self._options)
        stages, processor = stages_of(encoder, self._options), encoder.processor
        self._merge_size = processor.merge_size
        self._stages = stages.preparing(prepare_with(processor.prepare))

    def _records(self, batch: RowBatch) -> Iterator[Record]:
        for column in self._columns:
            if column not in batch:
                raise ValueError(f"the rows have no column {column!r}, but {', '.join(batch)}")
        ids, images = (batch[column] for column in self._columns)
        for image_id, image in zip(ids, images, strict=True):
            yield row_record(image_id, image)


class RayEncoder(EncoderActor):
    """For `map_batches`: rows with an id and an image in, one row of features for each out.

    Args:
        model: a checkpoint that every node finds, a folder or a hub id.
        image_column: paths, URLs of fsspec's, bytes of image files, uint8 arrays [H, W, 3], or
            datasets' {"bytes", "path"}.
        id_column: text or numbers; a column of the same name comes out.
        options: pool, layers, merged, on_error, workers and warmup mean what they mean to `vitrt
            encode`; the others say how a folder is written.
        runtime: device, dtype and the other choices of an encoder; None: the defaults.
        adapter, revision: as `VisionEncoder.from_pretrained` takes them.

    Columns that come out, in the order of the rows that went in:
        grid_thw: int32 [3]. tokens: int32, merged ones.
        features: the bytes of a safetensors file, which `from_bytes` turns into ImageFeatures; or
            with pool="mean" `vector`, float32 [out_hidden].
        error: why the image was skipped, else null; the others are null then.
    """

    def __call__(self, batch: RowBatch) -> Iterator[pa.Table]:
        """Equal batches give equal pieces, which Ray asks of a batch that it runs again."""
        ids = self.ids(batch)
        to_host = ToHost(self._stages)
        pipeline: Pipeline[int, Record, OnHost] = Pipeline(
            self._stages, to_host, join=to_host.join, workers=self._options.workers
        )
        rows: list[dict[str, Any]] = []
        held = 0
        with pipeline:
            for index, result in _one_behind(pipeline.through(enumerate(self._records(batch)))):
                rows.append(self._row(ids[index], result))
                held += 0 if isinstance(result, Exception) else _nbytes(rows[-1])
                if held >= _TABLE_BYTES:
                    yield self._table(rows)
                    rows, held = [], 0
        if rows:
            yield self._table(rows)

    def ids(self, batch: RowBatch) -> list[Any]:
        """The ids of the rows, as their column has them."""
        name = self._columns[0]
        return batch[name].tolist() if name in batch else []

    def _row(self, image_id: Any, result: OnHost | Exception) -> dict[str, Any]:
        if isinstance(result, Exception):
            message = str(result) or type(result).__name__
            if str(image_id) not in message:
                message = f"{image_id}: {message}"
            if self._options.on_error == "fail":
                raise ValueError(message) from result
            return {self._columns[0]: image_id, "error": message}
        features = result.wait()
        row = {
            self._columns[0]: image_id,
            "grid_thw": list(features.grid_thw),
            "tokens": tokens_of(features),
        }
        if self._options.pool == "mean":
            return row | {"vector": features.embeddings[0].numpy()}
        return row | {"features": to_bytes(features)}

    def _table(self, rows: list[dict[str, Any]]) -> pa.Table:
        pooled = self._options.pool == "mean"
        kinds = {
            "grid_thw": pa.list_(pa.int32()),
            "tokens": pa.int32(),
            **({"vector": pa.list_(pa.float32())} if pooled else {"features": pa.large_binary()}),
            "error": pa.string(),
        }
        ids = pa.array([row[self._columns[0]] for row in rows])
        columns = [pa.array([row.get(name) for row in rows], kind) for name, kind in kinds.items()]
        return pa.table([ids, *columns], [self._columns[0], *kinds])


def _one_behind(results: Iterable[Result]) -> Iterator[Result]:
    """Hold each batch's results until the next is launched: the device never waits for a reader."""
    held: list[Result] = []
    newest: Transfer | None = None
    for key, result in results:
        if not isinstance(result, Exception) and result.transfers[-1] is not newest:
            yield from held
            held, newest = [], result.transfers[-1]
        held.append((key, result))
    yield from held


def _nbytes(row: Mapping[str, Any]) -> int:
    return row["vector"].nbytes if "vector" in row else len(row["features"])


def open_run_model(
    model: str | os.PathLike[str],
    runtime: RuntimeConfig,
    adapter: str | os.PathLike[str] | None,
    revision: str | None,
) -> Checkpoint:
    """A checkpoint under the pixel limits of a run."""
    return open_checkpoint(
        str(model),
        adapter=adapter,
        revision=revision,
        min_pixels=runtime.min_pixels,
        max_pixels=runtime.max_pixels,
    )


def limit_memory() -> None:
    """An actor with a part of a GPU keeps to this part of its memory."""
    share = ray.get_runtime_context().get_assigned_resources().get("GPU", 1)
    if share < 1 and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(share)
