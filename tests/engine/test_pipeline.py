"""The pipeline's stages: bounds, order, memory, stops, one bad item; fed by hand or by a source."""

from __future__ import annotations

import itertools
import logging
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.folders import FakeEncoder, assert_same, fake_features, pooled
from vitrt.cores import default_workers
from vitrt.engine import memory
from vitrt.engine.feature_stream import features_of, stream_features
from vitrt.engine.memory import memory_lacking, page_locked
from vitrt.engine.pipeline import Pipeline, take_batch
from vitrt.engine.splitting import DeviceMemoryError, HostMemoryError
from vitrt.engine.stages import Stages
from vitrt.engine.window import Window
from vitrt.features import ImageFeatures, join_pooled
from vitrt.images.prepared import PreparedImage

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def image(t: int, h: int, w: int, grey: int = 1) -> PreparedImage:
    frames = 2 * t if t > 1 else 1
    pixels = np.random.default_rng(grey).integers(0, 256, (frames, h * 16, w * 16, 3), np.uint8)
    return PreparedImage(pixels, (t, h, w))


def stages(run: Any = None, *, budget: int = 64, memory: int | None = None, **more: Any) -> Any:
    """Of items that are prepared already, or are what preparing them raises."""

    def prepare(item: PreparedImage | Exception) -> PreparedImage:
        if isinstance(item, Exception):
            raise item
        return item

    run = run or FakeEncoder(memory=memory).run
    return Stages(prepare, run, budget, more.pop("device", CPU), **more)


def results(of: Any, items: Sequence[Any], **options: Any) -> list[Any]:
    return list(stream_features(of, items, full_batches=True, failed=lambda e: e, **options))


@pytest.mark.parametrize(
    ("cores", "workers"), [(0, 1), (1, 1), (2, 2), (3, 3), (4, 3), (16, 12), (128, 16)]
)
def test_some_cores_are_left_to_what_feeds_the_device(cores: int, workers: int):
    assert default_workers(cores) == workers


# Batches


def held(sizes: Sequence[int], failed: Sequence[int] = ()) -> list[tuple[str, Any]]:
    entries = zip("abcdefgh", sizes, strict=False)
    return [
        (name, ValueError(name) if index in failed else image(1, 2, size // 2))
        for index, (name, size) in enumerate(entries)
    ]


def drain(entries: list[tuple[str, Any]], *, in_order: bool) -> list[str]:
    batches = []
    while entries:
        batches.append("".join(name for name, _ in take_batch(entries, 100, in_order=in_order)))
    return batches


def test_batches_out_of_order_are_filled_and_starve_nobody() -> None:
    assert drain(held((60, 50, 30, 44, 4, 200)), in_order=False) == ["ace", "bd", "f"]


def test_batches_in_order_end_before_what_does_not_fit() -> None:
    assert drain(held((60, 50, 30, 44, 4, 200)), in_order=True) == ["a", "bc", "de", "f"]
    assert drain(held((60, 40, 30)), in_order=True) == ["ab", "c"]


@pytest.mark.parametrize("in_order", [True, False])
def test_errors_take_no_room(in_order: bool) -> None:
    assert drain(held((200, 2, 2), failed=[1]), in_order=in_order)[0] == "ab"


# Each item for itself


def test_results_are_in_order_each_features_or_its_error() -> None:
    items = [image(1, 2, 4, n) if n % 5 else OSError(f"no {n}") for n in range(23)]
    for budget in (8, 40, 1000):
        found = results(stages(budget=budget), items)
        for item, result in zip(items, found, strict=True):
            if isinstance(item, Exception):
                assert result is item
            else:
                assert_same(result, fake_features(item))


def test_a_refused_batch_loses_only_the_image_that_is_refused() -> None:
    def picky(images: Sequence[PreparedImage]) -> list[ImageFeatures]:
        if any(image.grid_thw == (1, 2, 6) for image in images):
            raise ValueError("no six")
        return [fake_features(image) for image in images]

    items = [image(1, 2, 6 if n == 3 else 4, n) for n in range(8)]
    found = results(stages(picky), items)
    assert [n for n, result in enumerate(found) if isinstance(result, Exception)] == [3]
    assert str(found[3]) == "no six" and not isinstance(found[3], DeviceMemoryError)
    with pytest.raises(ValueError, match="no six"):
        features_of(stages(picky), items)


def test_what_is_wrong_with_the_device_is_nobodys_own() -> None:
    def broken(images: Sequence[PreparedImage]) -> list[ImageFeatures]:
        raise RuntimeError("CUDA error: device-side assert")

    with pytest.raises(RuntimeError, match="device-side"):
        results(stages(broken), [image(1, 2, 2)])


@pytest.mark.parametrize("count", [1, 3])
def test_the_first_error_is_raised_and_no_thread_is_left(count: int) -> None:
    before = threading.active_count()
    items = [image(1, 2, 2)] * (count - 1) + [OSError("first"), OSError("second")][:count]
    with pytest.raises(OSError, match="first") as caught:
        features_of(stages(), items)
    assert threading.active_count() == before, caught


@pytest.mark.parametrize("in_order", [True, False])
def test_a_clip_over_the_budget_goes_in_several_forwards(in_order: bool) -> None:
    clip, still = image(7, 4, 4, 3), image(1, 4, 4)
    encoder = FakeEncoder()
    sizes: list[int] = []

    def run(images: Sequence[PreparedImage]) -> list[ImageFeatures]:
        sizes.append(sum(each.num_patches for each in images))
        return encoder.run(images)

    pipeline: Pipeline[int, Any, ImageFeatures] = Pipeline(
        stages(run, budget=50), lambda compute: compute(), workers=1, in_order=in_order
    )
    with pipeline:
        found = dict(pipeline.through(enumerate([still, clip, still])))
    assert max(sizes) == 48 and sum(sizes) == 9 * 16
    assert found[1].grid_thw == (7, 4, 4)
    assert_same(found[1], fake_features(clip))


def test_the_mean_of_a_clip_is_that_of_all_its_frames() -> None:
    """Of runs of unequal length: 3, 3 and 1 frame."""

    def run(images: Sequence[PreparedImage]) -> list[ImageFeatures]:
        return [pooled(fake_features(each)) for each in images]

    clip = image(7, 4, 4, 3)
    (found,) = results(stages(run, budget=50, join=join_pooled), [clip])
    wanted = pooled(fake_features(clip))
    assert found.grid_thw == wanted.grid_thw and found.deepstack is None
    torch.testing.assert_close(found.embeddings, wanted.embeddings)


# Memory


def test_a_clip_that_does_not_fit_is_divided_further(caplog: pytest.LogCaptureFixture) -> None:
    clip = image(9, 4, 4, 3)
    (found,) = results(stages(budget=1000, memory=40), [clip])
    assert_same(found, fake_features(clip))
    assert caplog.text.count("out of device memory") == 2  # 144 patches, 72, then 32 of 36
    (found,) = results(stages(budget=1000, memory=15), [clip])
    assert isinstance(found, DeviceMemoryError) and "18 frames" in str(found)


def test_an_image_over_the_memory_is_named_and_the_rest_goes_on() -> None:
    items = [image(1, 4, 4, n) for n in range(5)]
    items[2] = image(1, 16, 16)
    found = results(stages(budget=400, memory=100), items)
    assert [isinstance(result, Exception) for result in found] == [False, False, True, False, False]
    assert "image 2: resized to 256 x 256 pixels it has 256 patches" in str(found[2])


def test_what_counts_as_out_of_memory_and_whose_it_is() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    for error, whose in (
        (torch.OutOfMemoryError("CUDA out of memory"), "device"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "device"),
        (RuntimeError("CUDA error: out of memory"), "device"),
        (MemoryError(), "host"),
        (caught.value, "host"),
    ):
        assert memory_lacking(error, CUDA) == whose
        assert memory_lacking(error, CPU) == "device"  # it has no other
    for other in (RuntimeError("CUDA error: an illegal access"), ValueError("out of memory")):
        assert memory_lacking(other, CUDA) is memory_lacking(other, CPU) is None


def test_a_host_without_memory_does_not_lower_the_devices_budget(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Batches are halved while it lasts, and are whole again afterwards."""
    sizes: list[int] = []

    def run(images: Sequence[PreparedImage]) -> list[ImageFeatures]:
        sizes.append(len(images))
        if len(sizes) == 1:
            raise MemoryError
        if len(sizes) == 6:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't ...")
        return [fake_features(each) for each in images]

    items = [image(1, 2, 4, n) for n in range(25)]
    pipeline: Pipeline[int, Any, ImageFeatures] = Pipeline(
        stages(run, budget=64, device=CUDA), lambda compute: compute(), workers=1
    )
    with pipeline:
        found = dict(pipeline.through(enumerate(items)))
    assert sizes == [8, 4, 4, 8, 8, 1]
    assert isinstance(found[24], HostMemoryError) and "host's memory" in str(found[24])
    assert [n for n, result in found.items() if isinstance(result, Exception)] == [24]
    assert "out of device memory" not in caplog.text


def test_page_locked_memory_gives_way_to_ordinary_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[bool] = []
    empty = torch.empty

    def no_locking(*args: Any, pin_memory: bool = False, **more: Any) -> torch.Tensor:
        asked.append(pin_memory)
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return empty(*args, **more)

    freed: list[int] = []
    monkeypatch.setattr(memory.torch, "empty", no_locking)
    monkeypatch.setattr(memory, "_empty_host_cache", lambda: freed.append(1))
    with caplog.at_level(logging.WARNING):
        tensor = page_locked((3, 4), torch.float32)
    assert tensor.shape == (3, 4) and asked == [True, True, False] and freed == [1]
    assert caplog.text.count("no page-locked host memory") == 1


# The window


def take_all(window: Window[int, Any]) -> Iterator[tuple[int, Any]]:
    while not window.ended and not window.stopped:
        if window.is_ready():
            yield window.take()
        else:
            window.wait()


def submit_all(window: Window[int, Any], count: int) -> threading.Thread:
    def feed() -> None:
        for number in range(count):
            if not window.submit(number, number):
                break
        window.close()

    thread = threading.Thread(target=feed)
    thread.start()
    return thread


def test_preparing_is_bounded_by_bytes_and_count() -> None:
    one = image(1, 2, 2)
    prepared: list[int] = []

    def prepare(number: int) -> PreparedImage:
        prepared.append(number)
        return one

    for most_bytes, most in ((10 * one.pixels.nbytes, 10 + 3), (1 << 30, 65), (0, 1)):
        prepared.clear()
        with Window(prepare, workers=3, most_items=64, most_bytes=most_bytes) as window:
            thread = submit_all(window, 300)
            taken = 0
            for key, _ in take_all(window):
                taken += 1
                assert key == taken - 1
                if taken % 50 == 1:
                    time.sleep(0.05)
                    assert len(prepared) - taken <= most
            thread.join()
            assert taken == 300


def test_stopping_may_interrupt_stopping() -> None:
    """By a signal: a lock that one call holds would hang the other."""
    window: Window[int, Any] = Window(
        lambda _: image(1, 2, 2), workers=1, most_items=1, most_bytes=1
    )
    signals = 0

    def handle(number: int, frame: object) -> None:
        nonlocal signals
        signals += 1
        window.stop()

    before = signal.signal(signal.SIGPROF, handle)
    signal.setitimer(signal.ITIMER_PROF, 0.0001, 0.0001)
    try:
        with window:
            deadline = time.monotonic() + 30
            while signals < 50 and time.monotonic() < deadline:
                window.stop()
                len(window), window.waiting, window.ended
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    assert signals >= 50


def test_any_thread_may_submit_while_one_takes_results() -> None:
    """As a service does: what is there goes when the device is free, and no result is lost."""
    pipeline: Pipeline[tuple[int, int], Any, ImageFeatures] = Pipeline(
        stages(), lambda compute: compute(), workers=2, full_batches=False
    )
    answered = {(thread, number): threading.Event() for thread in range(4) for number in range(25)}

    def ask(thread: int) -> None:
        for number in range(25):
            item = OSError("bad") if number == 13 else image(1, 2, 2, number)
            assert pipeline.submit((thread, number), item)
            assert answered[thread, number].wait(30)  # the next one comes after the answer

    threads = [threading.Thread(target=ask, args=(thread,)) for thread in range(4)]
    found: dict[tuple[int, int], Any] = {}
    with pipeline:
        for thread in threads:
            thread.start()
        for key, result in pipeline:
            found[key] = result
            answered[key].set()
            if len(found) == 100:
                pipeline.close()
        for thread in threads:
            thread.join()
    for (_, number), result in found.items():
        if number == 13:
            assert isinstance(result, OSError)
        else:
            assert_same(result, fake_features(image(1, 2, 2, number)))
    assert set(found) == set(answered)
    with pytest.raises(ValueError, match="after the last"):
        Pipeline.submit(closed_pipeline(), (0, 0), image(1, 2, 2))


def closed_pipeline() -> Pipeline[Any, Any, Any]:
    pipeline: Pipeline[Any, Any, Any] = Pipeline(stages(), lambda compute: compute(), workers=1)
    pipeline.close()
    return pipeline


def test_a_stop_ends_whoever_waits() -> None:
    started = threading.Event()

    def prepare(item: int) -> PreparedImage:
        started.set()
        return image(1, 2, 2)

    pipeline: Pipeline[int, int, Any] = Pipeline(
        Stages(prepare, FakeEncoder().run, 1 << 20, CPU), lambda compute: compute(), workers=1
    )
    refused: list[int] = []

    def feed() -> None:
        for number in itertools.count():
            if not pipeline.submit(number, number):
                refused.append(number)
                return

    thread = threading.Thread(target=feed)
    timer = threading.Timer(0.1, pipeline.stop)
    with pipeline:
        thread.start()
        started.wait(10)
        timer.start()
        assert list(pipeline) == []  # a batch is never full here
        thread.join(10)
    assert refused and not thread.is_alive()


def test_items_are_begun_in_their_order_however_threads_wake() -> None:
    begun: list[int] = []

    def prepare(item: int) -> Any:
        begun.append(item)
        return SimpleNamespace(nbytes=1)

    with (
        Window[int, int](prepare, workers=1, most_items=4, most_bytes=100) as window,
        ThreadPoolExecutor(2) as threads,
    ):
        second = threads.submit(window._prepare_in_turn, 1, 1)
        wait([second], 0.1)
        threads.submit(window._prepare_in_turn, 0, 0).result()
        second.result()
    assert begun == [0, 1]
