"""FeatureWriter fills an output folder shard by shard; FeatureStore (feature_store.py) reads it.

An image is in the folder once its manifest line is: the line is flushed to the disk only after the
whole shard is there under its final name.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import torch
from torch import Tensor

from vitrt.features import ImageFeatures
from vitrt.store.durable import AppendError, append, discard, write_file
from vitrt.store.feature_shard import MERGE_SIZE, write_shard
from vitrt.store.manifest import (
    Entry,
    SourceImage,
    error_line,
    errors_name,
    manifest_name,
    shard_name,
)
from vitrt.store.run_identity import RunIdentity

logger = logging.getLogger(__name__)

SHARD_IMAGES = 1024  # most images of a shard: what a kill costs stays small where features are


class FeatureWriter:
    """Writes features into one rank's shards. Not for several threads at once.

    A full shard is written by a thread while the next one fills; one at a time, in order. Nothing
    is durable before `flush`. What that thread raises, an OutputError mostly, the next call that
    hands a shard over raises, and all later ones; what was finished before stays valid.
    """

    def __init__(
        self,
        folder: Path,
        identity: RunIdentity,
        *,
        rank: int = 0,
        first_shard: int = 0,
        shard_mib: float,
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
        self._held: list[tuple[SourceImage, ImageFeatures, str | None]] = []
        self._held_ids: set[str] = set()
        self._held_bytes = 0
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        if not self._manifest.exists():
            write_file(self._manifest, [])

    def add(
        self, image: SourceImage, features: ImageFeatures, *, replaces: str | None = None
    ) -> None:
        """Take the features of one image, on the CPU; kept by reference until its shard is written.

        `replaces` names the shard that holds the features of an older state of the image. Of a run
        with `--pool mean` they are the one pooled row. A shard cannot hold two images of one
        id: the first is kept, the other one is recorded as an error.
        """
        if image.id in self._held_ids:
            message = f"{image.id}: {image.path} is a second image with this id"
            logger.warning("skipped: %s", message)
            self.add_error(image.id, "ValueError", message)
            return
        assert not self._pool or len(features.embeddings) == 1, "a pooled run writes one row"
        self._held.append((image, features, replaces))
        self._held_ids.add(image.id)
        self._held_bytes += sum(tensor.nbytes for tensor in features.tensors().values())
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
        """Wait until nothing is being written, successfully or not."""
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

    def _write(self, held: list[tuple[SourceImage, ImageFeatures, str | None]]) -> None:
        try:
            self._write_shard(held)
        except BaseException as error:
            self._failure = error

    def _write_shard(self, held: list[tuple[SourceImage, ImageFeatures, str | None]]) -> None:
        path = self.folder / shard_name(self.rank, self._next_shard)
        self._next_shard += 1
        crc32 = write_shard(path, self._tensors(held), self._metadata)
        lines = "".join(
            Entry(
                image.id,
                path.name,
                features.grid_thw,
                tokens_of(features),
                image.size,
                image.mtime,
                replaces,
                crc32,
                features.times and tuple(round(time, 6) for time in features.times),
            ).line()
            for image, features, replaces in held
        )
        try:
            append(self._manifest, lines.encode(), flush=True)
        except AppendError as error:
            if error.undone:
                discard(path)  # not listed, so nobody would ever read it
            raise
        self.images += len(held)

    def _tensors(
        self, held: list[tuple[SourceImage, ImageFeatures, str | None]]
    ) -> list[tuple[str, Tensor]]:
        if self._pool:
            return [(f"{image.id}/pooled", features.embeddings[0]) for image, features, _ in held]
        tensors = [
            (
                f"{image.id}/grid_thw",
                torch.tensor(features.grid_thw, dtype=torch.int64, device="cpu"),
            )
            for image, features, _ in held
        ]
        for image, features, _ in held:
            tensors += [
                (f"{image.id}/{name}", tensor.contiguous())
                for name, tensor in features.tensors().items()
            ]
        return tensors


def tokens_of(features: ImageFeatures) -> int:
    """Merged tokens by the grid: pooled features hold only one row."""
    t, h, w = features.grid_thw
    return t * h * w // features.merge_size**2
