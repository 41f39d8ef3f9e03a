"""`stream`: in order, early, in bounded memory, and errors in their turn."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vitrt import ImageError, ParallelContext, VisionEncoder
from vitrt.engine.feature_stream import features_of, raise_it, stream_features
from vitrt.engine.pipeline import Pipeline
from vitrt.engine.stages import Stages

GREY = np.full((64, 64, 3), 128, np.uint8)


@pytest.fixture(scope="module")
def encoder(tiny_qwen3_vl: Path) -> VisionEncoder:
    return VisionEncoder.from_pretrained(tiny_qwen3_vl, device="cpu")


@pytest.mark.parametrize("good", [0, 1, 5, 40])
def test_what_comes_before_a_bad_image_is_not_lost(encoder: VisionEncoder, good: int):
    stream = encoder.stream([*[GREY] * good, "no such file.png", GREY])
    for _ in range(good):
        next(stream)
    with pytest.raises(ImageError, match="no such file"):
        next(stream)


@pytest.mark.parametrize("good", [0, 1, 5, 40])
def test_what_comes_before_a_source_that_breaks_is_not_lost(encoder: VisionEncoder, good: int):
    def source() -> Iterator[np.ndarray]:
        yield from [GREY] * good
        raise OSError("the disk went away")

    stream = encoder.stream(source())
    for _ in range(good):
        next(stream)
    with pytest.raises(OSError, match="went away"):
        next(stream)


def test_an_error_comes_in_its_images_place(encoder: VisionEncoder, tmp_path: Path):
    (tmp_path / "cut.png").write_bytes(b"no image")
    images: list[Any] = [GREY, GREY + 9, "no such file.png", GREY, tmp_path / "cut.png", b"", GREY]
    found = list(encoder.stream(images, on_error="yield"))
    bad = [index for index, each in enumerate(found) if isinstance(each, ImageError)]
    assert bad == [2, 4, 5] and len(found) == len(images)
    assert "no such file.png" in str(found[2]) and "cut.png" in str(found[4])
    good = [
        image for image, each in zip(images, found, strict=True) if not isinstance(each, Exception)
    ]
    for each, wanted in zip(
        (each for each in found if not isinstance(each, Exception)),
        encoder.encode(good),
        strict=True,
    ):
        torch.testing.assert_close(each.embeddings, wanted.embeddings)


def test_a_source_that_breaks_is_no_images_error(encoder: VisionEncoder):
    def source() -> Iterator[np.ndarray]:
        yield GREY
        raise OSError("the disk went away")

    stream = encoder.stream(source(), on_error="yield")
    next(stream)
    with pytest.raises(OSError, match="went away"):
        next(stream)


def test_on_error_is_one_of_two(encoder: VisionEncoder):
    with pytest.raises(ValueError, match="on_error is 'skip'; it must be 'raise' or 'yield'"):
        encoder.stream([GREY], on_error="skip")  # type: ignore[call-overload]


def test_an_image_over_the_devices_memory_is_an_error_of_its_own(
    encoder: VisionEncoder, monkeypatch: pytest.MonkeyPatch
):
    """In `encode` and `stream` as in the job; the others go on in smaller batches."""
    run = encoder.run_prepared

    def short(images: list[Any], request: Any) -> Any:
        if sum(image.num_patches for image in images) > 40:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(images, request)

    monkeypatch.setattr(encoder, "run_prepared", short)
    small, large = [GREY] * 9, np.full((320, 320, 3), 7, np.uint8)
    assert len(encoder.encode(small)) == 9
    found = list(encoder.stream([*small, large, GREY], on_error="yield"))
    assert isinstance(found[9], ImageError) and "image 9" in str(found[9])
    assert sum(isinstance(each, ImageError) for each in found) == 1
    with pytest.raises(ValueError, match="image 9: resized to"):
        encoder.encode([*small, large])


def test_a_slow_source_is_not_waited_for(encoder: VisionEncoder):
    """Its images come out one by one, not when a batch is full or the source ends."""
    given = 0

    def source() -> Iterator[np.ndarray]:
        nonlocal given
        for _ in range(12):
            time.sleep(0.05)
            given += 1
            yield GREY

    most = 0
    for shown, _ in enumerate(encoder.stream(source(), workers=1), start=1):
        most = max(most, given - shown)
    assert shown == 12 and most <= 3


def test_a_source_that_pauses_keeps_a_batch_waiting_only_once(encoder: VisionEncoder):
    """As a queue does between two bursts of requests."""
    pauses: list[int] = []  # images held back by each
    shown = 0

    def source() -> Iterator[np.ndarray]:
        for burst in range(1, 4):
            yield from [GREY] * 5
            pauses.append(5 * burst - shown)
            time.sleep(0.1)

    for _ in encoder.stream(source(), workers=2):
        shown += 1
    assert shown == 15
    # What is in hand when the second pause begins was decoded and goes out before it.
    assert pauses[1:] == [0, 0]


@pytest.mark.parametrize("full_batches", [False, True])
@pytest.mark.parametrize("place", [0, 1, 20])
def test_a_source_that_stalled_once_is_trusted_again(place: int, full_batches: bool):
    """The next tar file, a listing, a collection of garbage: decoding must run ahead again."""
    decoding, most = 0, 0

    def source() -> Iterator[int]:
        for number in range(200):
            if number == place:
                time.sleep(0.05)
            yield number

    def prepare(number: int):
        nonlocal decoding, most
        with lock:
            decoding += 1
            if number > 60:
                most = max(most, decoding)
        time.sleep(0.01)  # long beside what it takes to start all decoders
        with lock:
            decoding -= 1
        return prepared(number)

    def run(images: list[Any]) -> list[Any]:
        sizes.append(len(images))
        time.sleep(0.005)  # a forward
        return images

    lock = threading.Lock()
    sizes: list[int] = []
    stages = Stages(prepare, run, 160, torch.device("cpu"))
    found = stream_features(stages, source(), workers=8, full_batches=full_batches, failed=raise_it)
    assert [image.number for image in found] == list(range(200))
    assert most >= 6
    assert len(sizes) <= (20 if full_batches else 80)


def prepared(number: int) -> Any:
    image = SimpleNamespace(num_patches=16, number=number, is_lazy=False, nbytes=16)
    image.split = lambda most: [image]
    return image


def test_memory_is_bounded_and_abandoning_ends_the_threads(encoder: VisionEncoder):
    taken = 0

    def source() -> Iterator[np.ndarray]:
        nonlocal taken
        while True:
            taken += 1
            yield GREY

    before = threading.active_count()
    stream = encoder.stream(source(), workers=2)
    for shown in range(1, 20):
        next(stream)
        patches = 16 * shown
        assert taken * 16 <= patches + encoder.max_batch_tokens + 16 * 4 + 16
    stream.close()
    assert threading.active_count() <= before


@pytest.mark.parametrize("full_batches", [False, True])
def test_ranks_of_one_tower_make_the_same_batches(full_batches: bool):
    """Whatever decodes fast on one rank and slowly on another."""

    def run(pauses: dict[int, float]) -> list[list[int]]:
        def prepare(number: int):
            time.sleep(pauses.get(number, 0))
            return prepared(number)

        made: list[list[int]] = []
        stages = Stages(prepare, noting(made), 64, torch.device("cpu"))
        options = {"full_batches": full_batches, "failed": raise_it}
        list(stream_features(stages, range(10), workers=2, **options))
        return made

    batches = [run({1: 0.1, 7: 0.1}), run({3: 0.1})]
    if full_batches:
        assert batches == [[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]] * 2
    else:
        assert batches[0] != batches[1]


@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_stream_of_ranks_of_one_tower_makes_full_batches(
    encoder: VisionEncoder, tp_size: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("vitrt.encoder.stream_features", lambda *_, **options: options)
    monkeypatch.setattr(encoder.engine, "parallel", ParallelContext(tp_size=tp_size))
    assert encoder.stream([GREY])["full_batches"] is (tp_size > 1)  # type: ignore[index]


def noting(made: list[list[int]]) -> Any:
    def run(images: list[Any]) -> list[Any]:
        made.append([image.number for image in images])
        return images

    return run


class Decoder:
    """Decodes at once, but for the numbers it holds back."""

    def __init__(self) -> None:
        self.held = threading.Event()

    def prepare(self, number: int) -> Any:
        if number < 0:
            self.held.wait(30)
        return prepared(number)


class Paced(Pipeline[int, int, Any]):
    """Fed with numbers; `looks` is what each look at the device finds: whether it wants more."""

    def __init__(self, decoder: Decoder, looks: Iterator[bool], budget: int, ahead: int = 64):
        self.made: list[list[int]] = []
        stages = Stages(decoder.prepare, noting(self.made), budget, torch.device("cpu"))
        super().__init__(
            stages, lambda compute: compute(), workers=2, full_batches=False, ahead=ahead
        )
        self._pace.wants_more = lambda: next(looks)  # type: ignore[method-assign]


def test_a_batch_fills_up_while_the_device_has_work():
    decoder = Decoder()
    decoder.held.set()
    with Paced(decoder, itertools.repeat(False), 48) as pipeline:
        list(pipeline.through(enumerate([1, 2, -3, 4, 5])))
    assert pipeline.made == [[1, 2, -3], [4, 5]]


def test_a_busy_device_is_waited_for_and_a_free_one_is_not():
    decoder = Decoder()
    looks = itertools.chain([False, False, True], itertools.repeat(False))
    with Paced(decoder, looks, 1000) as pipeline:
        results = pipeline.through(enumerate([1, -2, 3]))
        assert next(results)[1].number == 1 and pipeline.made == [[1]]
        decoder.held.set()  # the device wanted more at the third look
        assert [image.number for _, image in results] == [-2, 3]
    assert pipeline.made == [[1], [-2, 3]]


def test_many_small_images_are_each_looked_at_once():
    """Each was once weighed against all that were held."""
    weighed = 0

    class Small:
        nbytes, is_lazy = 16, False

        @property
        def num_patches(self) -> int:
            nonlocal weighed
            weighed += 1
            return 16

    stages = Stages(lambda number: Small(), lambda images: images, 1 << 20, torch.device("cpu"))
    for count in (1000, 8000):
        weighed = 0
        found = features_of(stages, range(count))  # type: ignore[arg-type]
        assert len(found) == count
        assert weighed <= 8 * count
