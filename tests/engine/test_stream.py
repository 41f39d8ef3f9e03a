"""`stream`: in order, early, in bounded memory, and errors in their turn."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vitrt import VisionEncoder
from vitrt.engine.batching import _LookAhead, stream_in_order
from vitrt.images.processor import ImageError

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
        return SimpleNamespace(num_patches=16, number=number)

    lock = threading.Lock()
    sizes = []
    with ThreadPoolExecutor(8) as pool:
        ahead = _LookAhead(source(), pool, prepare, 16)  # type: ignore[arg-type]
        while batch := ahead.take(160, lambda: not full_batches):
            sizes.append(len(batch))
            time.sleep(0.005)  # a forward
    assert sum(sizes) == 200 and most >= 6
    assert len(sizes) <= (20 if full_batches else 80)


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


@pytest.mark.parametrize("tp_size", [1, 2])
def test_ranks_of_one_tower_make_the_same_batches(tp_size: int):
    """Whatever decodes fast on one rank and slowly on another."""

    def run(pauses: dict[int, float]) -> list[list[int]]:
        def prepare(number: int):
            time.sleep(pauses.get(number, 0))
            image = SimpleNamespace(num_patches=16, number=number)
            image.split = lambda most: [image]
            return image

        def encode_prepared(images):
            made.append([image.number for image in images])
            return images

        made: list[list[int]] = []
        encoder = SimpleNamespace(
            device=torch.device("cpu"),
            max_batch_tokens=64,
            parallel=SimpleNamespace(tp_size=tp_size),
            processor=SimpleNamespace(prepare=prepare),
            encode_prepared=encode_prepared,
        )
        list(stream_in_order(encoder, range(10), workers=2))  # type: ignore[arg-type]
        return made

    batches = [run({1: 0.1, 7: 0.1}), run({3: 0.1})]
    if tp_size > 1:
        assert batches == [[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]] * 2
    else:
        assert batches[0] != batches[1]


class Decoder:
    """Decodes at once, but for the numbers it holds back."""

    def __init__(self) -> None:
        self.held = threading.Event()

    def prepare(self, number: int):
        if number < 0:
            self.held.wait(30)
        return type("Prepared", (), {"num_patches": 16, "number": number})()


def look_ahead(numbers: list[int], decoder: Decoder, pool, size: int = 64) -> _LookAhead:
    return _LookAhead(numbers, pool, decoder.prepare, size)  # type: ignore[arg-type]


def test_a_batch_fills_up_while_the_device_has_work():
    decoder = Decoder()
    decoder.held.set()
    with ThreadPoolExecutor(2) as pool:
        ahead = look_ahead([1, 2, -3, 4, 5], decoder, pool)
        batches = list(iter(lambda: ahead.take(48, lambda: False), []))
    numbers = [[image.number for image in batch] for batch in batches]
    assert numbers == [[1, 2, -3], [4, 5]]


def test_a_busy_device_is_waited_for_and_a_free_one_is_not():
    decoder = Decoder()
    with ThreadPoolExecutor(2) as pool:
        ahead = look_ahead([1, -2, 3], decoder, pool)
        time.sleep(0.05)
        looks = iter([False, False, True])
        assert [i.number for i in ahead.take(1000, lambda: next(looks))] == [1]
        assert next(looks, None) is None  # it looked until the device wanted more
        decoder.held.set()
        assert [i.number for i in ahead.take(1000, lambda: False)] == [-2, 3]
        assert ahead.take(1000, lambda: True) == []


def test_many_small_images_take_time_in_proportion():
    """Each was once weighed against all that were held."""

    def seconds(count: int) -> float:
        start = time.perf_counter()
        with ThreadPoolExecutor(1) as pool:
            ahead = look_ahead(list(range(count)), Decoder(), pool)
            while ahead.take(1 << 20, lambda: False):
                pass
        return time.perf_counter() - start

    seconds(200)
    small = min(seconds(1000) for _ in range(3))
    large = min(seconds(8000) for _ in range(3))
    assert large < 8 * small * 2.5
