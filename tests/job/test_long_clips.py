"""Clips that several ranks encode together: threads stand for ranks, the first owns the clip."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed import HashStore

from tests.support.folders import (
    IDENTITY,
    SHARD_MIB,
    FakeEncoder,
    assert_same,
    fake_features,
    photo,
    pooled,
)
from tests.support.ranks import wait_for
from tests.support.videos import hold_at_most, write_video
from vitrt.engine.stages import Stages
from vitrt.features import ImageFeatures, join_pooled
from vitrt.images.prepared import PreparedImage
from vitrt.images.video import VideoFile
from vitrt.job import encode, long_clips
from vitrt.job.long_clips import LongClips
from vitrt.job.options import EncodeOptions
from vitrt.job.progress import Progress
from vitrt.job.run import Outcome, encode_records
from vitrt.job.stop import Stop
from vitrt.parallel.shared_parts import SharedParts
from vitrt.sources.folder import walk
from vitrt.store.check import check_folder
from vitrt.store.durable import OutputError
from vitrt.store.encoded_index import EncodedIndex
from vitrt.store.feature_store import FeatureStore
from vitrt.store.recovery import recover
from vitrt.store.writer import FeatureWriter

FRAMES = 48
Run = Callable[[Sequence[PreparedImage]], None]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "in"
    photo(folder / "a.png", 1)
    write_video(folder / "long.mp4", FRAMES, rate=2)
    hold_at_most(2 * 4 * 3 * 64 * 96, monkeypatch)  # runs of 2 of 24
    return folder


class Ranks:
    """Two ranks of one run; `on_run` of each is called before a batch goes to its device."""

    def __init__(self, output: Path, *, pool: bool = False, memory: int | None = None) -> None:
        output.mkdir()
        self.output = output
        self.outcomes: dict[int, Outcome] = {}
        self.errors: dict[int, BaseException] = {}
        self.stops = [Stop(), Stop()]
        self.progress = [Progress(), Progress()]
        self.on_run: list[Run] = [lambda images: None] * 2
        self.given = threading.Event()  # a part came from the second rank
        self._pool, self._memory = pool, memory
        self._store = HashStore()

    def run(self, folder: Path) -> None:
        threads = [threading.Thread(target=self._rank, args=(rank, folder)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()

    def _rank(self, rank: int, folder: Path) -> None:
        stop = self.stops[rank]
        identity = replace(IDENTITY, pool="mean") if self._pool else IDENTITY
        parts = SharedParts(self._store, 2, leaving=lambda: stop.requested)
        clips = LongClips(parts, self.output, pool=self._pool)
        give = clips.give
        clips.give = lambda *part: (give(*part), self.given.set())  # type: ignore[method-assign]
        stages = FakeEncoder(memory=self._memory).stages(pool=self._pool)
        compute = stages.run

        def run(images: Sequence[Any]) -> list[ImageFeatures]:
            self.on_run[rank](images)
            pairs = zip(compute(images), images, strict=True)
            return [replace(each, times=image.times) for each, image in pairs]

        try:
            self.outcomes[rank] = encode_records(
                replace(stages, run=run, join=join_pooled if self._pool else stages.join),
                walk(str(folder)) if rank == 0 else [],
                FeatureWriter(self.output, identity, rank=rank, shard_mib=SHARD_MIB),
                EncodedIndex(self.output),
                progress=self.progress[rank],
                stop=stop,
                workers=2,
                clips=clips,
            )
        except BaseException as error:
            self.errors[rank] = error

    def until_given(self, images: Sequence[PreparedImage]) -> None:
        """The owner comes to its clip once the other rank has done a part."""
        assert images[0].shape[0] == 1 or self.given.wait(20), "the other rank did nothing"


def test_a_long_video_of_few_pixels_is_shared_too(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen3-VL bounds a video's pixels. Where no rank takes a part, a worker decodes all of it."""
    monkeypatch.setattr("vitrt.images.processor.MAX_WHOLE_BYTES", 80 << 20)
    monkeypatch.setattr("vitrt.images.processor.MANY_FRAMES", FRAMES // 2)
    given: list[Stages[Any]] = []
    monkeypatch.setattr(encode, "encode_records", lambda stages, *_, **__: given.append(stages))
    fake = FakeEncoder()
    parts = SharedParts(HashStore(), 2, leaving=lambda: False)
    for shared in (None, parts):
        ranks: Any = SimpleNamespace(parts=shared, rank=0, size=1)
        inputs: Any = SimpleNamespace(until=lambda stop: ())
        (output := tmp_path / f"out{len(given)}").mkdir()
        options = EncodeOptions(shard_mib=SHARD_MIB)
        encode._run(
            fake.stages(), fake.processor, inputs, output, IDENTITY, options, Progress(), Stop(),
            ranks,
        )  # fmt: skip
    (record,) = (each for each in walk(str(folder)) if each.id == "long.mp4")
    whole, lazy = (stages.prepare(record) for stages in given)
    assert whole.is_lazy is False and lazy.is_lazy
    assert (lazy.pixels == whole.pixels).all()


def assert_whole(ranks: Ranks, folder: Path, *, pool: bool = False) -> None:
    assert not ranks.errors
    store = FeatureStore(ranks.output)
    assert sorted(store) == ["a.png", "long.mp4"] and check_folder(ranks.output).problems == []
    processor = FakeEncoder().processor
    for name in store:
        image = processor.prepare(folder / name)
        whole = fake_features(PreparedImage(image.pixels, image.grid_thw))
        if pool:
            torch.testing.assert_close(store[name].embeddings, pooled(whole).embeddings)
            assert store[name].grid_thw == whole.grid_thw
        else:
            assert_same(store[name], whole)
        assert store[name].times == image.times
    lines = [line for path in ranks.output.glob("manifest-*") for line in path.open()]
    assert len(lines) == 2
    assert not list(ranks.output.glob(".part*"))
    states = [progress.snapshot() for progress in ranks.progress]
    assert [state.images for state in states] == [2, 0]
    assert [state.listed for state in states] == [2, 0]


@pytest.mark.parametrize("pool", [False, True])
def test_two_ranks_encode_one_clip(pool: bool, folder: Path, tmp_path: Path) -> None:
    ranks = Ranks(tmp_path / "out", pool=pool)
    ranks.on_run[0] = ranks.until_given
    ranks.run(folder)
    assert_whole(ranks, folder, pool=pool)


def test_what_one_rank_cannot_do_its_owner_does(folder: Path, tmp_path: Path) -> None:
    ranks = Ranks(tmp_path / "out")
    refused: list[int] = []

    def refuse(images: Sequence[PreparedImage]) -> None:
        refused.append(1)
        raise ValueError("not here")

    ranks.on_run[1] = refuse
    ranks.on_run[0] = lambda images: wait_for(lambda: bool(refused) or images[0].shape[0] == 1)
    ranks.run(folder)
    assert_whole(ranks, folder)


def test_memory_that_runs_out_amid_a_shared_clip(folder: Path, tmp_path: Path) -> None:
    """The owner goes over its own parts again, and over no other."""
    ranks = Ranks(tmp_path / "out")
    frames: list[int] = []

    def run(images: Sequence[PreparedImage]) -> None:
        ranks.until_given(images)
        frames.append(images[0].shape[0])
        if frames[-1] == 4 and frames.count(4) == 2:
            raise torch.OutOfMemoryError

    def leave_some(images: Sequence[PreparedImage]) -> None:
        """Of the clip to its owner: no second part before it failed."""
        wait_for(lambda: not ranks.given.is_set() or frames.count(4) >= 2)

    ranks.on_run = [run, leave_some]
    ranks.run(folder)
    assert_whole(ranks, folder)
    assert frames.count(4) == 2 and frames.count(2) >= 2


def test_a_broken_clip_is_one_error_of_its_owner(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = VideoFile._decode

    def ends_early(self: VideoFile, start: int = 0) -> Any:
        for number, frame in enumerate(decode(self, start), start):
            if number > 30:
                return
            yield frame

    monkeypatch.setattr(VideoFile, "_decode", ends_early)
    ranks = Ranks(tmp_path / "out")
    ranks.run(folder)
    assert not ranks.errors
    assert list(FeatureStore(ranks.output)) == ["a.png"]
    (line,) = [line for path in ranks.output.glob("errors-*") for line in path.open()]
    assert "long.mp4: cannot be read as a video: it ends before frame" in line
    assert [progress.snapshot().skipped for progress in ranks.progress] == [1, 0]


def test_a_rank_that_leaves_lets_the_others_finish(folder: Path, tmp_path: Path) -> None:
    ranks = Ranks(tmp_path / "out")
    ranks.on_run[0] = lambda images: wait_for(
        lambda: images[0].shape[0] == 1 or ranks.stops[1].requested
    )

    def leave(images: Sequence[PreparedImage]) -> None:
        if ranks.given.is_set():
            ranks.stops[1].request()

    ranks.on_run[1] = leave
    ranks.run(folder)
    assert ranks.outcomes[1].interrupted and not ranks.outcomes[0].interrupted
    assert_whole(ranks, folder)


def test_a_part_that_cannot_be_read_is_encoded_again(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(long_clips, "to_bytes", lambda features, **_: b"torn")
    ranks = Ranks(tmp_path / "out")
    ranks.on_run[0] = ranks.until_given
    ranks.run(folder)
    assert_whole(ranks, folder)
    assert "encoding again what another rank did of a clip" in caplog.text


def test_a_rank_whose_disk_is_full_leaves_what_it_has_in_hand(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, chunks: Any) -> None:
        raise OutputError("write", path, OSError(errno.ENOSPC, "No space left on device"))

    monkeypatch.setattr(long_clips, "write_file", refuse)
    ranks = Ranks(tmp_path / "out")
    ranks.on_run[0] = lambda images: wait_for(lambda: images[0].shape[0] == 1 or 1 in ranks.errors)
    ranks.run(folder)
    assert isinstance(ranks.errors.pop(1), OutputError)
    assert_whole(ranks, folder)


def test_a_part_that_comes_after_the_end_is_left(tmp_path: Path) -> None:
    """As where the listing thread takes one just as the rank stops."""
    store = HashStore()
    own, other = (SharedParts(store, 2, leaving=lambda: False) for _ in range(2))
    (tmp_path / "a.mp4").touch()
    (record,) = walk(str(tmp_path))
    offer = own.offer({"record": asdict(record), "bounds": [0, 2]}, 1)
    clips = LongClips(other, tmp_path, pool=False)
    parts = clips.parts(0)
    assert next(parts).id == "a.mp4"
    clips._in_hand.clear()  # `close` was faster
    parts.close()
    assert store.check(["part/0/0"]) and not offer.is_done(0)


def test_a_part_that_nobody_waits_for_leaves_no_file(tmp_path: Path) -> None:
    store = HashStore()
    own, other = (SharedParts(store, 2, leaving=lambda: False) for _ in range(2))
    (tmp_path / "a.mp4").touch()
    (record,) = walk(str(tmp_path))
    offer = own.offer({"record": asdict(record), "bounds": [0, 1, 2]}, 2)
    clips = LongClips(other, tmp_path, pool=False)
    features = fake_features(PreparedImage(np.zeros((2, 64, 64, 3), np.uint8), (1, 4, 4)))
    parts = clips.parts(0)
    clips.give(next(parts), features)
    assert len(list(tmp_path.glob(".part*"))) == 1
    part = next(parts)
    offer.close()
    clips.give(part, features)
    assert len(list(tmp_path.glob(".part*"))) == 1


def test_an_owner_that_leaves_writes_no_part_of_a_clip(folder: Path, tmp_path: Path) -> None:
    ranks = Ranks(tmp_path / "out")
    leaving = threading.Event()

    def wait(images: Sequence[PreparedImage]) -> None:
        """With a part in hand, until its owner is gone."""
        leaving.set()
        wait_for(lambda: 0 in ranks.outcomes or 0 in ranks.errors)
        ranks.stops[1].request()

    def stop() -> None:
        leaving.wait(20)
        ranks.stops[0].request()

    ranks.on_run[0] = lambda images: wait_for(
        lambda: leaving.is_set() or len(images[0].pixels) == 1
    )
    ranks.on_run[1] = wait
    thread = threading.Thread(target=stop)
    thread.start()
    ranks.run(folder)
    thread.join()
    assert not ranks.errors and ranks.outcomes[0].interrupted
    assert list(FeatureStore(ranks.output)) in ([], ["a.png"])
    recover(ranks.output)
    assert not list(ranks.output.glob(".part*"))
    assert check_folder(ranks.output).problems == []
