"""The stages between a listing and shards: bounds, order, memory, interrupts, bad images."""

from __future__ import annotations

import itertools
import os
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.folders import (
    FakeEncoder,
    assert_holds,
    assert_same,
    encode,
    expected,
    fake_features,
    photo,
    photos,
)
from vitrt import FeatureStore, ImageFeatures
from vitrt.checkpoint.opened import open_checkpoint
from vitrt.config import RuntimeConfig
from vitrt.engine.stages import Stages
from vitrt.engine.window import Window
from vitrt.images.prepared import PreparedImage
from vitrt.job.encode import EncodeOptions, Summary, encode_folder
from vitrt.job.listing import Listing
from vitrt.job.progress import Progress
from vitrt.job.run import SkippedImageError
from vitrt.job.stop import Stop
from vitrt.job.to_host import Transfer
from vitrt.sources.folder import walk
from vitrt.sources.inputs import Inputs
from vitrt.sources.record import Record
from vitrt.store.check import check_folder
from vitrt.store.durable import OutputError
from vitrt.store.writer import FeatureWriter


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
    records = [Record(str(index), source.path, 1, 1.0) for index in range(1200)]
    encoder = FakeEncoder(budget=1 << 20)
    encode(tmp_path, tmp_path / "out", encoder=encoder, records=records, shard_mib=1)
    assert encoder.batches == [512, 512, 176]


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    folder = photos(tmp_path / "in", 25)
    for output in ("one", "two"):
        encode(folder, tmp_path / output, workers=4)
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
        def run(self, images: Sequence[PreparedImage]) -> list[ImageFeatures]:
            time.sleep(0.01)
            if len(self.batches) == 20:
                stop.request()
            return super().run(images)

    encoder = Stopping(budget=6)
    outcome = encode(tmp_path, tmp_path / "out", encoder=encoder, records=endless(), stop=stop)
    assert outcome.interrupted
    images = sum(encoder.batches)
    assert 20 <= images <= listed <= images + 64 + 8
    assert len(FeatureStore(tmp_path / "out")) == images
    assert check_folder(tmp_path / "out").problems == []


def test_a_turn_is_held_while_batches_run_and_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first images are prepared before it comes, the last features written when it has gone."""
    seen: list[str] = []
    prepared = threading.Event()

    class Turn:
        def __enter__(self) -> None:
            assert prepared.wait(60)
            seen.append("taken")

        def __exit__(self, *exception: object) -> None:
            seen.append("given")

    class Watched(FakeEncoder):
        def stages(self, *, pool: bool = False) -> Stages[Record]:
            stages = super().stages(pool=pool)

            def prepare(record: Record) -> Any:
                prepared.set()
                return stages.prepare(record)

            return stages.preparing(prepare)

        def run(self, images: Sequence[PreparedImage]) -> list[ImageFeatures]:
            seen.append("run")
            return super().run(images)

    close = FeatureWriter.close
    monkeypatch.setattr(
        FeatureWriter, "close", lambda writer: (seen.append("written"), close(writer))
    )
    folder = photos(tmp_path / "in", 6)
    encode(folder, tmp_path / "out", encoder=Watched(budget=10_000), turn=Turn())
    assert seen == ["taken", "run", "given", "written"]
    assert_holds(tmp_path / "out", expected(folder))


def test_a_listing_that_was_cut_short_has_not_ended() -> None:
    image = PreparedImage(np.zeros((1, 32, 32, 3), np.uint8), (1, 2, 2))
    records = [Record(str(number), "") for number in range(300)]

    def window() -> Window[Record, Record]:
        return Window(lambda _: image, workers=1, most_items=64, most_bytes=1 << 30)

    taking = window()
    with Listing(records, taking) as listing, taking:
        while not taking.is_ready():
            taking.wait()
        taking.stop()
    assert listing.listed < 300 and not listing.all_listed

    ended = threading.Event()

    def leaving() -> Iterator[Record]:  # as of a rank among several
        yield records[0]
        ended.wait(10)

    taking = window()
    with Listing(leaving(), taking) as listing, taking:
        taking.stop()
        ended.set()
    assert not listing.all_listed


def skipping(folder: Path) -> Iterator[Record]:
    """Half a minute of images that are done, on a slow disk."""
    records = list(walk(str(folder)))
    for _ in range(30_000):
        time.sleep(0.001)
        yield from records


def test_an_interrupt_ends_the_skipping_of_what_is_done(tmp_path: Path) -> None:
    folder = photos(tmp_path / "in", 1)
    encode(folder, tmp_path / "out")
    stop = Stop()
    timer = threading.Timer(0.2, stop.request)
    timer.start()
    started = time.monotonic()
    assert encode(folder, tmp_path / "out", records=skipping(folder), stop=stop).interrupted
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
        encode(folder, tmp_path / "out", records=itertools.chain(new, skipping(folder)))
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
    encode(folder, tmp_path / "out", encoder=encoder, records=hanging(), stop=stop, shard_mib=1)
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
        encode(tmp_path, tmp_path / "out", records=broken())
    assert check_folder(tmp_path / "out").problems == []


def test_no_thread_outlives_a_run(tmp_path: Path) -> None:
    before = threading.active_count()
    encode(photos(tmp_path / "in", 5), tmp_path / "out")
    with pytest.raises(SkippedImageError):
        (tmp_path / "in/000.png").write_bytes(b"")
        encode(tmp_path / "in", tmp_path / "out", on_error="fail")
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
    with pytest.raises(SkippedImageError, match="zz"):
        encode(
            folder, tmp_path / "two", encoder=FakeEncoder(budget=400, memory=100), on_error="fail"
        )
    assert check_folder(tmp_path / "two").problems == []


def test_a_clip_over_the_budget_goes_in_several_forwards(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = photos(tmp_path / "in", 4)
    wanted = expected(folder)
    pixels = np.random.default_rng(5).integers(0, 256, (18, 64, 64, 3), dtype=np.uint8)
    clip = PreparedImage(pixels, (9, 4, 4))
    encoder = FakeEncoder(budget=50, memory=60)
    processor = encoder.processor

    class Clips:
        def prepare(self, image: Any, name: str | None = None) -> PreparedImage:
            return clip if name == "clip.mp4" else processor.prepare(image, name=name)

    encoder.processor = Clips()  # type: ignore[assignment]
    records = [Record("clip.mp4", "clip.mp4", 1, 1.0), *walk(str(folder))]
    encode(folder, tmp_path / "out", encoder=encoder, records=records)
    assert_holds(tmp_path / "out", wanted | {"clip.mp4": fake_features(clip)})
    assert "out of device memory" not in caplog.text  # the budget was kept to


def test_an_interrupt_does_not_wait_for_the_end_of_a_clip(tmp_path: Path) -> None:
    pixels = np.random.default_rng(5).integers(0, 256, (18, 64, 64, 3), dtype=np.uint8)
    stop = Stop()

    class Interrupting(FakeEncoder):
        def run(self, images: Sequence[PreparedImage]) -> list[ImageFeatures]:
            if len(self.batches) == 1:
                stop.request()
            return super().run(images)

    encoder = Interrupting(budget=16)
    stages = replace(encoder.stages(), prepare=lambda record: PreparedImage(pixels, (9, 4, 4)))
    encoder.stages = lambda **_: stages  # type: ignore[method-assign]
    records = [Record("clip.mp4", "clip.mp4", 1, 1.0)]
    outcome = encode(tmp_path, tmp_path / "out", encoder=encoder, records=records, stop=stop)
    assert outcome.interrupted and len(encoder.batches) == 2  # of 9
    assert len(FeatureStore(tmp_path / "out")) == 0
    assert check_folder(tmp_path / "out").problems == []


def test_other_device_errors_are_not_swallowed(tmp_path: Path) -> None:
    class Broken(FakeEncoder):
        def run(self, images: Sequence[PreparedImage]) -> list[ImageFeatures]:
            if sum(self.batches) > 4:
                raise RuntimeError("CUDA error: device-side assert")
            return super().run(images)

    folder = photos(tmp_path / "in", 20)
    with pytest.raises(RuntimeError, match="device-side assert"):
        encode(folder, tmp_path / "out", encoder=Broken(budget=8))
    wanted = expected(folder)
    store = FeatureStore(tmp_path / "out")
    assert 4 < len(store) < 20
    for name in store:
        assert_same(store[name], wanted[name])


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
    wait = Transfer.wait
    waited = 0

    def broken(transfer: Transfer) -> None:
        nonlocal waited
        waited += 1
        if waited == 3:
            raise RuntimeError("CUDA error")
        wait(transfer)

    monkeypatch.setattr(Transfer, "wait", broken)
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
    records = [*walk(str(folder)), vanishing]
    progress = Progress()
    encode(folder, tmp_path / "out", records=records, progress=progress)
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
        def prepare(self, image: Any, name: str | None = None) -> PreparedImage:
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
        encode(folder, tmp_path / "out", on_error="fail", workers=1)
    assert check_folder(tmp_path / "out").problems == []
    (folder / "005.png").unlink()
    encode(folder, tmp_path / "out")
    assert_holds(tmp_path / "out", expected(folder))


def test_a_file_that_changes_during_the_run_is_encoded_again(tmp_path: Path) -> None:
    """The state in the manifest is that of the listing: a later write differs from it."""
    folder = photos(tmp_path / "in", 3)
    records = list(walk(str(folder)))
    photo(folder / "000.png", 50)
    os.utime(folder / "000.png", (3, 3))
    encode(folder, tmp_path / "out", records=records)
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
