"""The stages between a listing and shards: bounds, order, memory, interrupts, bad images."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.folders import (
    FakeEncoder,
    assert_holds,
    assert_same,
    encode,
    expected,
    photo,
    photos,
)
from vitrt import FeatureStore, ImageFeatures
from vitrt.checkpoint.opened import open_checkpoint
from vitrt.config import RuntimeConfig
from vitrt.engine.batching import default_workers
from vitrt.images.processor import PreparedImage
from vitrt.job.decode_ahead import DecodeAhead
from vitrt.job.device_stage import (
    DeviceMemoryError,
    DeviceStage,
    Encoded,
    Refused,
    is_out_of_memory,
)
from vitrt.job.encode import EncodeOptions, Summary, encode_folder
from vitrt.job.pipeline import PipelineOptions, SkippedImageError, Stop, take_batch
from vitrt.job.progress import Progress
from vitrt.sources.folder import walk
from vitrt.sources.inputs import Inputs
from vitrt.sources.record import Record
from vitrt.store.check import check_folder
from vitrt.store.durable import OutputError
from vitrt.store.writer import FeatureWriter


def item(name: str, *grid: int) -> tuple[Record, PreparedImage]:
    t, h, w = grid
    pixels = np.full((1, h * 16, w * 16, 3), len(name), dtype=np.uint8)
    return Record(name, name), PreparedImage(pixels, (t, h, w))


def names(batch: Sequence[tuple[Record, PreparedImage]]) -> str:
    return "".join(source.id for source, _ in batch)


@pytest.mark.parametrize(
    ("cores", "workers"), [(0, 1), (1, 1), (2, 2), (3, 3), (4, 3), (16, 12), (128, 16)]
)
def test_some_cores_are_left_to_what_feeds_the_device(cores: int, workers: int):
    assert default_workers(cores) == workers


def test_look_ahead_fills_batches_and_starves_nobody() -> None:
    pending = [
        item(name, 1, 2, patches // 2)
        for name, patches in zip("abcdef", (60, 50, 30, 44, 4, 200), strict=True)
    ]
    assert names(take_batch(pending, 100)) == "ace"
    assert names(take_batch(pending, 100)) == "bd"
    assert names(take_batch(pending, 100)) == "f"
    assert pending == []


def test_features_equal_and_batches_do_not_exceed_the_budget(tmp_path: Path) -> None:
    folder = photos(tmp_path / "in", 30)
    for budget in (1, 8, 40, 10_000):
        encoder = FakeEncoder(budget)
        output = tmp_path / str(budget)
        encode(folder, output, encoder=encoder)
        assert_holds(output, expected(folder))
        assert sum(encoder.batches) == 30
        assert budget != 1 or set(encoder.batches) == {1}
    assert encoder.batches == [30]


def test_tiny_images_wait_in_bounded_numbers(tmp_path: Path) -> None:
    source = Record("x", str(photo(tmp_path / "x.png", 0)), 1, 1.0)
    sources = [Record(str(index), source.path, 1, 1.0) for index in range(1200)]
    encoder = FakeEncoder(budget=1 << 20)
    encode(tmp_path, tmp_path / "out", encoder=encoder, sources=sources, shard_mib=1)
    assert encoder.batches == [512, 512, 176]


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    folder = photos(tmp_path / "in", 25)
    for output in ("one", "two"):
        encode(folder, tmp_path / output, options=PipelineOptions(workers=4))
    for path in sorted((tmp_path / "one").glob("features-*")):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_encoding_starts_before_listing_ends(tmp_path: Path) -> None:
    """An endless folder: the window fills, batches run, and the listing waits."""
    source = Record("x", str(photo(tmp_path / "x.png", 0)), 1, 1.0)
    listed = 0
    stop = Stop()

    def endless() -> Iterator[Record]:
        nonlocal listed
        for listed in itertools.count(1):
            yield Record(f"{listed}", source.path, 1, 1.0)

    class Stopping(FakeEncoder):
        def encode_prepared(self, images: Sequence[PreparedImage]) -> list[ImageFeatures]:
            time.sleep(0.01)
            if len(self.batches) == 20:
                stop.request()
            return super().encode_prepared(images)

    encoder = Stopping(budget=6)
    outcome = encode(tmp_path, tmp_path / "out", encoder=encoder, sources=endless(), stop=stop)
    assert outcome.interrupted
    images = sum(encoder.batches)
    assert 20 <= images <= listed <= images + 64 + 8
    assert len(FeatureStore(tmp_path / "out")) == images
    assert check_folder(tmp_path / "out").problems == []


def test_decoding_is_bounded_by_bytes_and_count(tmp_path: Path) -> None:
    image = PreparedImage(np.zeros((1, 32, 32, 3), np.uint8), (1, 2, 2))
    decoded: list[str] = []

    def prepare(source: Record) -> PreparedImage:
        decoded.append(source.id)
        return image

    for max_bytes, most in ((10 * image.pixels.nbytes, 10 + 3), (1 << 30, 65), (0, 1)):
        decoded.clear()
        sources = [Record(str(n), "") for n in range(300)]
        with DecodeAhead(sources, prepare, workers=3, max_bytes=max_bytes) as ahead:
            taken = 0
            for one in ahead:
                taken += 1
                assert one.source.id == str(taken - 1)
                if taken % 50 == 1:
                    time.sleep(0.05)
                    assert len(decoded) - taken <= most
            assert taken == 300 and ahead.all_listed and ahead.listed == 300


def test_a_listing_that_was_cut_short_has_not_ended() -> None:
    image = PreparedImage(np.zeros((1, 32, 32, 3), np.uint8), (1, 2, 2))
    sources = [Record(str(number), "") for number in range(300)]
    with DecodeAhead(sources, lambda _: image, workers=1) as ahead:
        next(iter(ahead))
        ahead.stop()
    assert ahead.listed < 300 and not ahead.all_listed

    ended = threading.Event()

    def leaving() -> Iterator[Record]:  # as of a rank among several
        yield sources[0]
        ended.wait(10)

    with DecodeAhead(leaving(), lambda _: image, workers=1) as ahead:
        ahead.stop()
        ended.set()
    assert not ahead.all_listed


def test_stopping_may_interrupt_stopping() -> None:
    """By a signal: a lock that one call holds would hang the other."""
    ahead = DecodeAhead([], lambda source: item("a", 1, 2, 2)[1], workers=1)
    stop = Stop()
    stop.then(ahead.stop)
    signals = 0

    def handle(number: int, frame: object) -> None:
        nonlocal signals
        signals += 1
        stop.request()

    before = signal.signal(signal.SIGPROF, handle)
    signal.setitimer(signal.ITIMER_PROF, 0.0001, 0.0001)
    try:
        with ahead:
            deadline = time.monotonic() + 30
            while signals < 50 and time.monotonic() < deadline:
                stop.request()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    assert signals >= 50


def skipping(folder: Path) -> Iterator[Record]:
    """Half a minute of images that are done, on a slow disk."""
    sources = list(walk(str(folder)))
    for _ in range(30_000):
        time.sleep(0.001)
        yield from sources


def test_an_interrupt_ends_the_skipping_of_what_is_done(tmp_path: Path) -> None:
    folder = photos(tmp_path / "in", 1)
    encode(folder, tmp_path / "out")
    stop = Stop()
    timer = threading.Timer(0.2, stop.request)
    timer.start()
    started = time.monotonic()
    assert encode(folder, tmp_path / "out", sources=skipping(folder), stop=stop).interrupted
    assert time.monotonic() - started < 5


def test_a_full_disk_ends_the_skipping_of_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = photos(tmp_path / "in", 1)
    encode(folder, tmp_path / "out")
    new = [Record(f"new{n}", str(folder / "000.png"), 1, 1.0) for n in range(70)]

    def full(*args: object, **kwargs: object) -> None:
        raise OutputError("write", tmp_path, OSError(28, "No space left on device"))

    monkeypatch.setattr(FeatureWriter, "add", full)
    started = time.monotonic()
    with pytest.raises(OutputError):
        encode(folder, tmp_path / "out", sources=itertools.chain(new, skipping(folder)))
    assert time.monotonic() - started < 5


def test_the_shard_in_hand_does_not_wait_for_the_listing(tmp_path: Path) -> None:
    folder = photos(tmp_path / "in", 6)
    stop, answers = Stop(), threading.Event()
    encoder = FakeEncoder(budget=6)

    def hanging() -> Iterator[Record]:
        yield from walk(str(folder))
        answers.wait(60)

    def interrupt() -> None:
        while sum(encoder.batches) < 2:
            time.sleep(0.01)
        stop.request()
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and not written:
            written.extend((tmp_path / "out").glob("features-*"))
            time.sleep(0.01)
        answers.set()

    written: list[Path] = []
    thread = threading.Thread(target=interrupt)
    thread.start()
    encode(folder, tmp_path / "out", encoder=encoder, sources=hanging(), stop=stop, shard_mib=1)
    thread.join()
    assert written


def test_an_interrupted_run_leaves_no_older_features(tiny_qwen3_vl: Path, tmp_path: Path) -> None:
    """It ends in good order, so the folder is as after any other run."""
    folder = photos(tmp_path / "in", 6)
    stop = Stop()

    class Interrupting(Progress):
        def count_batch(self, *args: Any, **kwargs: Any) -> None:
            super().count_batch(*args, **kwargs)
            stop.request()

    def run(progress: Progress, stop: Stop) -> Summary:
        return encode_folder(
            open_checkpoint(tiny_qwen3_vl),
            RuntimeConfig(device="cpu", max_batch_tokens=1),
            Inputs([folder]),
            tmp_path / "out",
            EncodeOptions(workers=1),
            progress=progress,
            stop=stop,
        )

    run(Progress(), Stop())
    for file in folder.rglob("*.png"):
        os.utime(file, (1, 1))
    summary = run(Interrupting(), stop)
    assert summary.interrupted and 0 < summary.state.replaced < 6
    result = check_folder(tmp_path / "out")
    assert result.problems == [] and result.images == 6


def test_errors_of_the_listing_surface(tmp_path: Path) -> None:
    def broken() -> Iterator[Record]:
        yield Record("a", str(photo(tmp_path / "a.png", 0)), 1, 1.0)
        raise ValueError("the folder vanished")

    with pytest.raises(ValueError, match="the folder vanished"):
        encode(tmp_path, tmp_path / "out", sources=broken())
    assert check_folder(tmp_path / "out").problems == []


def test_no_thread_outlives_a_run(tmp_path: Path) -> None:
    before = threading.active_count()
    encode(photos(tmp_path / "in", 5), tmp_path / "out")
    with pytest.raises(SkippedImageError):
        (tmp_path / "in/000.png").write_bytes(b"")
        encode(tmp_path / "in", tmp_path / "out", options=PipelineOptions(on_error="fail"))
    assert threading.active_count() == before


def test_a_finished_run_lets_go_of_its_encoder(tmp_path: Path) -> None:
    """Of several GPUs, whose process group can only be left when its recorded graphs are gone."""
    encoder = FakeEncoder()
    dropped = weakref.ref(encoder)
    stop, progress = Stop(), Progress()
    encode(
        photos(tmp_path / "in", 3), tmp_path / "out", encoder=encoder, stop=stop, progress=progress
    )
    del encoder
    assert dropped() is None
    assert not stop.requested and progress.snapshot().images == 3


def test_out_of_memory_splits_and_lowers_the_budget(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = photos(tmp_path / "in", 24)
    encoder = FakeEncoder(budget=200, memory=50)
    encode(folder, tmp_path / "out", encoder=encoder)
    assert_holds(tmp_path / "out", expected(folder))
    lowered = [record for record in caplog.records if "out of device memory" in record.message]
    assert 1 <= len(lowered) <= 4
    assert "was 200" in lowered[0].message
    assert all(count < 24 for count in encoder.batches)


def test_an_image_over_the_memory_is_named_with_what_would_fit(tmp_path: Path) -> None:
    folder = photos(tmp_path / "in", 6)
    wanted = expected(folder)
    photo(folder / "zz.png", 9, 256, 256)  # 256 patches
    encoder = FakeEncoder(budget=400, memory=100)
    encode(folder, tmp_path / "out", encoder=encoder)
    assert_holds(tmp_path / "out", wanted)
    (line,) = (tmp_path / "out/errors-00000.jsonl").read_text().splitlines()
    assert '"zz.png"' in line and "DeviceMemoryError" in line
    assert "256 x 256 pixels it has 256 patches" in line
    pixels = int(line.split("--max-pixels ")[1].split()[0])
    assert 16 * 16 * 30 <= pixels <= 16 * 16 * 100
    options = PipelineOptions(on_error="fail")
    with pytest.raises(SkippedImageError, match="zz"):
        encode(
            folder, tmp_path / "two", encoder=FakeEncoder(budget=400, memory=100), options=options
        )
    assert check_folder(tmp_path / "two").problems == []


def test_what_counts_as_out_of_memory() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_other_device_errors_are_not_swallowed(tmp_path: Path) -> None:
    class Broken(FakeEncoder):
        def encode_prepared(self, images: Sequence[PreparedImage]) -> list[ImageFeatures]:
            if sum(self.batches) > 4:
                raise RuntimeError("CUDA error: device-side assert")
            return super().encode_prepared(images)

    folder = photos(tmp_path / "in", 20)
    with pytest.raises(RuntimeError, match="device-side assert"):
        encode(folder, tmp_path / "out", encoder=Broken(budget=8))
    wanted = expected(folder)
    store = FeatureStore(tmp_path / "out")
    assert 4 < len(store) < 20
    for name in store:
        assert_same(store[name], wanted[name])


def test_a_refused_batch_loses_only_the_image_that_is_refused() -> None:
    class Picky(FakeEncoder):
        def encode_prepared(self, images: Sequence[PreparedImage]) -> list[ImageFeatures]:
            if any(image.grid_thw == (1, 2, 6) for image in images):
                raise ValueError("no six")
            return super().encode_prepared(images)

    batch = [item(str(n), 1, 2, 6 if n == 3 else 4) for n in range(8)]
    results = list(DeviceStage(Picky(), pool=False).encode(batch))
    refused = [result for result in results if isinstance(result, Refused)]
    kept = [s.id for result in results if isinstance(result, Encoded) for s in result.sources]
    assert [result.source.id for result in refused] == ["3"]
    assert kept == ["0", "1", "2", "4", "5", "6", "7"]
    assert not isinstance(refused[0].error, DeviceMemoryError)


def test_pooling_happens_before_the_copy_to_the_host() -> None:
    batch = [item("a", 1, 4, 4), item("b", 1, 2, 6)]
    (encoded,) = DeviceStage(FakeEncoder(), pool=True).encode(batch)
    assert isinstance(encoded, Encoded)
    wanted = FakeEncoder().encode_prepared([image for _, image in batch])
    for found, feature in zip(encoded.features, wanted, strict=True):
        assert found.embeddings.shape == (1, feature.embeddings.shape[1])
        assert torch.equal(found.pooled(), feature.pooled())
        assert found.grid_thw == feature.grid_thw


def test_a_writer_that_fails_ends_the_run_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = photos(tmp_path / "in", 30)

    def full(*args: object, **kwargs: object) -> None:
        raise OutputError("write", tmp_path, OSError(28, "No space left on device"))

    monkeypatch.setattr(FeatureWriter, "add", full)
    encoder = FakeEncoder(budget=4)
    with pytest.raises(OutputError, match="No space left"):
        encode(folder, tmp_path / "out", encoder=encoder)
    assert sum(encoder.batches) < 30


def test_a_writer_that_fails_keeps_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By something else than the disk: a copy from the device, say."""
    folder = photos(tmp_path / "in", 12)
    wait = Encoded.wait
    waited = 0

    def broken(encoded: Encoded) -> None:
        nonlocal waited
        waited += 1
        if waited == 3:
            raise RuntimeError("CUDA error")
        wait(encoded)

    monkeypatch.setattr(Encoded, "wait", broken)
    encoder = FakeEncoder(budget=8)
    with pytest.raises(RuntimeError, match="CUDA error"):
        encode(folder, tmp_path / "out", encoder=encoder, shard_mib=1)
    store, wanted = FeatureStore(tmp_path / "out"), expected(folder)
    assert len(store) == sum(encoder.batches[:2])
    for name in store:
        assert_same(store[name], wanted[name])


def test_bad_files_are_skipped_and_named(tmp_path: Path) -> None:
    folder = photos(tmp_path / "in", 4)
    wanted = expected(folder)
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("hello")
    (folder / "cut.png").write_bytes((folder / "000.png").read_bytes()[:400])
    (folder / "folder.jpg").mkdir()
    (folder / "gone.jpg").symlink_to("nowhere")
    photo(folder / "thin.png", 3, 1, 400)
    vanishing = Record("vanishing.png", str(folder / "vanishing.png"), 5, 5.0)
    sources = [*walk(str(folder)), vanishing]
    progress = Progress()
    encode(folder, tmp_path / "out", sources=sources, progress=progress)
    assert_holds(tmp_path / "out", wanted)
    errors = (tmp_path / "out/errors-00000.jsonl").read_text()
    bad = (
        "empty.png",
        "text.jpg",
        "cut.png",
        "folder.jpg",
        "gone.jpg",
        "thin.png",
        "vanishing.png",
    )
    assert errors.count("\n") == len(bad) == progress.snapshot().skipped
    for name in bad:
        assert f'"id": "{name}"' in errors
    assert errors.count("ImageError") == len(bad)


def test_whatever_a_decoder_raises_is_one_bad_image(tmp_path: Path) -> None:
    folder = photos(tmp_path / "in", 5)
    wanted = expected(folder)
    encoder = FakeEncoder()
    processor = encoder.processor

    class Surprising:
        def prepare(self, image: str, name: str | None = None) -> PreparedImage:
            if name == "003.png":
                raise ZeroDivisionError
            return processor.prepare(image, name=name)

    encoder.processor = Surprising()  # type: ignore[assignment]
    encode(folder, tmp_path / "out", encoder=encoder)
    del wanted["003.png"]
    assert_holds(tmp_path / "out", wanted)
    assert "ZeroDivisionError" in (tmp_path / "out/errors-00000.jsonl").read_text()


def test_fail_on_error_keeps_what_was_encoded(tmp_path: Path) -> None:
    folder = photos(tmp_path / "in", 9)
    (folder / "005.png").write_text("no image")
    with pytest.raises(SkippedImageError, match=r"005\.png: not an image"):
        encode(folder, tmp_path / "out", options=PipelineOptions(on_error="fail", workers=1))
    assert check_folder(tmp_path / "out").problems == []
    (folder / "005.png").unlink()
    encode(folder, tmp_path / "out")
    assert_holds(tmp_path / "out", expected(folder))


def test_a_file_that_changes_during_the_run_is_encoded_again(tmp_path: Path) -> None:
    """The state in the manifest is that of the listing: a later write differs from it."""
    folder = photos(tmp_path / "in", 3)
    sources = list(walk(str(folder)))
    photo(folder / "000.png", 50)
    os.utime(folder / "000.png", (3, 3))
    encode(folder, tmp_path / "out", sources=sources)
    encode(folder, tmp_path / "out")
    assert_holds(tmp_path / "out", expected(folder))


def test_progress_counts(tmp_path: Path) -> None:
    folder = photos(tmp_path / "in", 10)
    encode(folder, tmp_path / "out")
    photo(folder / "new.png", 5, 64, 64)
    (folder / "bad.png").write_text("x")
    progress = Progress()
    encode(folder, tmp_path / "out", progress=progress)
    state = progress.snapshot()
    assert (state.listed, state.resumed, state.images, state.skipped) == (12, 10, 1, 1)
    assert state.tokens == 4 and state.all_listed and state.seconds_left == 0
    assert 0 < state.busy_share <= 1
    for part in ("12/12 images", "images/s", "tokens/s", "busy", "skipped 1", "left 0:00:00"):
        assert part in state.text()


def test_large_images_decode_in_the_background(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for index in range(3):
        Image.new("RGB", (2000, 1500), (index, 2, 3)).save(folder / f"{index}.jpg")
    encode(folder, tmp_path / "out")
    assert_holds(tmp_path / "out", expected(folder))
