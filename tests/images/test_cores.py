"""Videos that are asked for at once: a few are decoded, those that came first."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Semaphore

import numpy as np
import pytest

from tests.support.videos import write_video
from vitrt.images import prepared
from vitrt.images.cores import CORES, Cores
from vitrt.images.prepared import Frame, LazyImage
from vitrt.images.video import VideoFile

PATIENCE = 30  # seconds until a test gives up


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> Cores:
    """Four, all free."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)), raising=False)
    cores = Cores()
    monkeypatch.setattr("vitrt.images.video.CORES", cores)
    return cores


def wait_for_line(cores: Cores, length: int) -> None:
    with cores._changed:
        for _ in range(100 * PATIENCE):
            if len(cores._line) >= length:
                return
            cores._changed.wait(0.01)
    pytest.fail(f"{len(cores._line)} wait or decode, not {length}")


def test_who_came_first_is_next(cores: Cores) -> None:
    turns: list[int] = []

    def take_turn(arrival: int) -> None:
        with cores.turn(arrival):
            turns.append(arrival)

    with ThreadPoolExecutor(3) as threads, cores.turn(1):
        with cores.turn(0):
            waiting = [threads.submit(take_turn, arrival) for arrival in (4, 2, 3)]
            wait_for_line(cores, 5)
            assert not turns
        for each in waiting:
            each.result(PATIENCE)
    assert turns == [2, 3, 4] and not cores._line


def test_of_many_videos_the_first_two_are_read(tmp_path: Path, cores: Cores) -> None:
    path = write_video(tmp_path / "a.mp4", 4)
    videos = [VideoFile(str(path), "a", arrival) for arrival in range(4)]
    begun: list[int] = []
    any_begun, go = Semaphore(0), Event()

    def read(number: int) -> None:
        def take(place: int, frame: np.ndarray) -> None:
            begun.append(number)
            any_begun.release()
            assert go.wait(PATIENCE)

        videos[number].read([0], take)

    with ThreadPoolExecutor(4) as threads:
        with cores.turn(-2), cores.turn(-1):
            reading = [threads.submit(read, number) for number in (3, 2, 1, 0)]
            wait_for_line(cores, 6)
        assert any_begun.acquire(timeout=PATIENCE) and any_begun.acquire(timeout=PATIENCE)
        first = sorted(begun)
        go.set()
        for each in reading:
            each.result(PATIENCE)
    assert first == [0, 1] and sorted(begun) == [0, 1, 2, 3]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")
def test_the_child_of_a_fork_waits_for_no_thread_of_its_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(write_video(tmp_path / "a.mp4", 4))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)), raising=False)
    with CORES.turn(-2), CORES.turn(-1):
        child = os.fork()
        if not child:
            signal.alarm(PATIENCE)
            VideoFile(path, "a")
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0


class Given:
    """Frames that are counted as they are taken."""

    nbytes = 0

    def __init__(self, frames: list[np.ndarray], given: Callable[[int], None]) -> None:
        self.frames, self.given = frames, given

    def read(self, indices: tuple[int, ...], take: Callable[[int, Frame], None]) -> None:
        for place, index in enumerate(indices):
            self.given(place)
            take(place, self.frames[index])


def test_frames_are_resized_while_the_next_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (40, 60, 3), np.uint8) for _ in range(12)]
    indices = (0, 1, 1, 1, *range(2, 12), 11)
    resize, third_given = prepared.resize_frame, Event()
    resized: list[int] = []
    waiting: list[int] = []

    def given(place: int) -> None:
        waiting.append(place - len(resized))
        if place == 2:
            third_given.set()

    def resize_late(*args: object) -> None:
        assert third_given.wait(PATIENCE)
        resize(*args)  # type: ignore[arg-type]
        resized.append(1)

    monkeypatch.setattr(prepared, "resize_frame", resize_late)
    pixels = LazyImage(Given(frames, given), indices, (8, 2, 2), (32, 32), "torch", None).pixels
    assert max(waiting) <= prepared._RESIZING + 2  # and those that come again, here two
    for index, each in zip(indices, pixels, strict=True):
        alone = np.empty((32, 32, 3), np.uint8)
        resize(frames[index], alone, "torch")
        np.testing.assert_array_equal(each, alone)


def test_what_cannot_be_resized_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("no")

    monkeypatch.setattr(prepared, "resize_frame", refuse)
    source = Given([np.zeros((40, 60, 3), np.uint8)] * 2, lambda _: None)
    with pytest.raises(ValueError, match="no"):
        _ = LazyImage(source, (0, 1), (1, 2, 2), (32, 32), "torch", None).pixels
