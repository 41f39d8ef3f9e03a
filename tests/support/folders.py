"""What tests of output folders share: small images, an encoder without a model, and its runs."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from vitrt.engine.stages import Stages
from vitrt.features import ImageFeatures
from vitrt.images.prepared import PreparedImage
from vitrt.images.processor import ImageProcessor
from vitrt.job.progress import Progress
from vitrt.job.run import Outcome, encode_records, prepare_with
from vitrt.job.stop import Stop
from vitrt.sources.folder import walk
from vitrt.sources.record import Record
from vitrt.store.check import check_folder
from vitrt.store.compaction import compact
from vitrt.store.durable import make_folder
from vitrt.store.encoded_index import EncodedIndex
from vitrt.store.feature_store import FeatureStore
from vitrt.store.lock import FolderLock
from vitrt.store.recovery import check_identity, clear, recover
from vitrt.store.run_identity import RunIdentity
from vitrt.store.shard_numbers import ShardNumbers
from vitrt.store.writer import FeatureWriter

WIDTH = 6
LEVELS = 2
IDENTITY = RunIdentity(
    model="some/model",
    model_type="qwen3_vl",
    weights="0123456789abcdef",
    dtype="float32",
    min_pixels=1024,
    max_pixels=65536,
    resize="pillow",
    pool="none",
)
SHARD_MIB = 1 / 2048  # two or three of the images below


class FakeEncoder:
    """Features that depend on every pixel of their own image alone, on the CPU."""

    def __init__(self, budget: int = 64, memory: int | None = None) -> None:
        """`memory`: patches that fit at once."""
        self.budget = budget
        self.memory = memory
        self.batches: list[int] = []
        self.processor = ImageProcessor(
            patch_size=16,
            merge_size=2,
            temporal_patch_size=2,
            min_pixels=IDENTITY.min_pixels,
            max_pixels=IDENTITY.max_pixels,
        )

    def stages(self, *, pool: bool = False) -> Stages[Record]:
        return Stages(
            prepare=prepare_with(self.processor.prepare),
            run=(lambda images: list(map(pooled, self.run(images)))) if pool else self.run,
            max_batch_patches=self.budget,
            device=torch.device("cpu"),
        )

    def run(self, images: Sequence[PreparedImage]) -> list[ImageFeatures]:
        patches = sum(int(np.prod(image.grid_thw)) for image in images)
        if self.memory is not None and patches > self.memory:
            raise torch.OutOfMemoryError(f"{patches} patches")
        self.batches.append(len(images))
        return [fake_features(image) for image in images]


def fake_features(image: PreparedImage) -> ImageFeatures:
    t, h, w = image.grid_thw
    shape = (t, -1, h // 2, 32, w // 2, 32, 3)  # a still has one frame, a clip's count in pairs
    blocks = image.pixels.reshape(shape).mean((1, 3, 5), dtype=np.float64)
    base = torch.from_numpy(blocks.astype(np.float32)).reshape(-1, 3)
    embeddings = torch.cat([base, base**0.5], dim=1)
    return ImageFeatures(embeddings, torch.stack([embeddings + 1, embeddings * 2]), (t, h, w))


def pooled(features: ImageFeatures) -> ImageFeatures:
    row = features.pooled()[None]
    return ImageFeatures(row, None, features.grid_thw, features.merge_size)


@contextmanager
def file_size_limit(nbytes: int) -> Iterator[None]:
    """The system refuses what makes a file larger, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def photo(path: Path, seed: int, height: int = 40, width: int = 70) -> Path:
    """A small PNG of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def photos(folder: Path, count: int) -> Path:
    """Images of several sizes, some in a subfolder."""
    for index in range(count):
        name = f"sub/{index:03}.png" if index % 3 == 2 else f"{index:03}.png"
        photo(folder / name, index, 30 + 17 * (index % 5), 40 + 23 * (index % 4))
    return folder


def encode(
    folder: Path,
    output: Path,
    *,
    encoder: FakeEncoder | None = None,
    identity: RunIdentity = IDENTITY,
    records: Iterable[Record] | None = None,
    on_error: Literal["skip", "fail"] = "skip",
    workers: int = 2,
    overwrite: bool = False,
    shard_mib: float = SHARD_MIB,
    stop: Stop | None = None,
    progress: Progress | None = None,
    rank: int = 0,
    turn: AbstractContextManager[object] | None = None,
) -> Outcome:
    """One run over a folder, as `vitrt encode` does it, without a model."""
    check_identity(output, identity)
    make_folder(output)
    with FolderLock(output, rank):
        if overwrite:
            clear(output)
        recover(output)
        writer = FeatureWriter(
            output,
            identity,
            rank=rank,
            first_shard=ShardNumbers(output).take(rank),
            shard_mib=shard_mib,
        )
        outcome = encode_records(
            (encoder or FakeEncoder()).stages(pool=identity.pool == "mean"),
            walk(str(folder)) if records is None else records,
            writer,
            EncodedIndex(output),
            progress=progress or Progress(),
            stop=stop or Stop(),
            workers=workers,
            on_error=on_error,
            turn=turn,
        )
        compact(output, outcome.dropped)
    return outcome


def expected(folder: Path) -> dict[str, ImageFeatures]:
    """What a folder of good images must come to."""
    encoder = FakeEncoder()
    return {
        source.id: fake_features(encoder.processor.prepare(source.path))
        for source in walk(str(folder))
    }


def assert_holds(output: Path, features: dict[str, ImageFeatures]) -> None:
    """The folder is clean and holds exactly these features."""
    assert check_folder(output).problems == []
    store = FeatureStore(output)
    assert set(store) == set(features)
    for name, feature in features.items():
        assert_same(store[name], feature)


def assert_same(found: ImageFeatures, wanted: ImageFeatures) -> None:
    assert found.grid_thw == wanted.grid_thw
    assert torch.equal(found.embeddings, wanted.embeddings)
    assert (found.deepstack is None) == (wanted.deepstack is None)
    if found.deepstack is not None and wanted.deepstack is not None:
        assert torch.equal(found.deepstack, wanted.deepstack)
