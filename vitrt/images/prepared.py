"""Images and clips that are ready for the device: decoded and resized, or as soon as asked for.

Shapes: F frames, H and W pixels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import prod
from typing import Protocol, TypeAlias

import numpy as np
from PIL import Image

from vitrt.images.pixels import copy_pixels
from vitrt.images.resize import Resize, resize_pillow, resize_torch

MAX_HELD_BYTES = 32 << 20  # pixels of a long video in memory: two runs of its frames
# Pixels up to which one worker decodes a video to its end. Qwen3-VL bounds a clip's at 75 MB,
# however long it is; a longer video keeps a decoder open, which at 1080p may hold as much.
MAX_WHOLE_BYTES = 80 << 20
# Frames of a file from which on ranks share the decoding, where they can: one worker takes half a
# minute and more for so many at 1080p, with a core or two.
MANY_FRAMES = 1 << 13
_RESIZING = 3  # threads that resize a clip's frames: decoding the next ones takes about as long

Frame = Image.Image | np.ndarray  # RGB; an array is uint8 [H, W, 3]


class FrameSource(Protocol):
    """Where the frames of an image or clip come from."""

    @property
    def nbytes(self) -> int:
        """About how much memory it holds to give them."""
        ...

    def read(self, indices: Sequence[int], take: Callable[[int, Frame], None]) -> None:
        """Give `take` the place in `indices`, which ascend, and the frame of each of them."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Frames:
    """Frames that are in memory."""

    frames: Sequence[Frame]
    times: tuple[float, ...] | None = None  # of each, in seconds
    nbytes = 0

    def read(self, indices: Sequence[int], take: Callable[[int, Frame], None]) -> None:
        for place, index in enumerate(indices):
            take(place, self.frames[index])


@dataclass(frozen=True, slots=True, eq=False)
class PreparedImage:
    """An image or clip, decoded and resized: all that the tower still has to do is normalise it."""

    pixels: np.ndarray  # uint8 [F, H, W, 3], C-contiguous; F = 1 for an image
    grid_thw: tuple[int, int, int]  # patches: frames (after temporal merging), rows, columns
    times: tuple[float, ...] | None = None  # seconds, of the grid's frames; None for an image
    is_lazy = False

    @property
    def num_patches(self) -> int:
        return prod(self.grid_thw)

    def decoded(self) -> PreparedImage:
        return self

    def runs(self) -> Generator[PreparedImage]:
        """Itself, its only run."""
        yield self

    @property
    def shape(self) -> tuple[int, int, int]:
        """F, H, W."""
        frames, height, width, _ = self.pixels.shape
        return frames, height, width

    @property
    def nbytes(self) -> int:
        """Memory that it takes until it is run."""
        return self.pixels.nbytes

    def split(self, most_patches: int) -> list[PreparedImage]:
        """Runs of its frames with at most so many patches each, or of one frame that has more."""
        t, h, w = self.grid_thw
        longest = max(most_patches // (h * w), 1)
        step = len(self.pixels) // t  # frames of one temporal patch
        return [
            PreparedImage(
                self.pixels[start * step : (start + longest) * step],
                (min(longest, t - start), h, w),
                self.times and self.times[start : start + longest],
            )
            for start in range(0, t, longest)
        ]


@dataclass(frozen=True, slots=True, eq=False)
class LazyImage:
    """An image or clip that is decoded when its pixels are asked for, each time anew.

    A video asked for one run of frames after the other, as `runs` does it, is decoded once, and no
    more than two runs of its frames are in memory.
    """

    source: FrameSource
    indices: tuple[int, ...]  # of its frames, ascending: one, or as many as temporal patches take
    grid_thw: tuple[int, int, int]
    size: tuple[int, int]  # H, W
    resize: Resize
    times: tuple[float, ...] | None
    begun: list[PreparedImage] = field(default_factory=list)  # its first run, if decoded already
    in_runs: Callable[[], Iterator[Prepared]] | None = None  # what `runs` decodes, if not all
    is_lazy = True

    @property
    def nbytes(self) -> int:
        """Memory that it takes until it is run."""
        return sum(run.nbytes for run in self.begun) + self.source.nbytes

    @property
    def num_patches(self) -> int:
        return prod(self.grid_thw)

    @property
    def shape(self) -> tuple[int, int, int]:
        """F, H, W."""
        return len(self.indices), *self.size

    @property
    def pixels(self) -> np.ndarray:
        """uint8 [F, H, W, 3]. Raises ImageError where a video ends early or is broken."""
        pixels = np.empty((*self.shape, 3), dtype=np.uint8)
        if len(pixels) == 1:  # not worth a thread
            self.source.read(
                self.indices, lambda place, frame: resize_frame(frame, pixels[place], self.resize)
            )
            return pixels
        again = [place for place, (a, b) in enumerate(pairwise(self.indices), 1) if a == b]
        begun: deque[Future[None]] = deque()
        with ThreadPoolExecutor(_RESIZING, "vitrt-resize") as threads:

            def take(place: int, frame: Frame) -> None:
                if place not in again:
                    if len(begun) == _RESIZING:
                        begun.popleft().result()
                    begun.append(threads.submit(resize_frame, frame, pixels[place], self.resize))

            self.source.read(self.indices, take)
        for resized in begun:
            resized.result()
        for place in again:
            pixels[place] = pixels[place - 1]
        return pixels

    def rows(self, start: int, stop: int) -> LazyImage:
        """Only the frames `start` to `stop` of the grid."""
        t, h, w = self.grid_thw
        step = len(self.indices) // t  # frames of one temporal patch
        return replace(
            self,
            indices=self.indices[start * step : stop * step],
            grid_thw=(min(stop, t) - start, h, w),
            times=self.times and self.times[start:stop],
            begun=[],
            in_runs=None,
        )

    def split(self, most_patches: int) -> list[LazyImage]:
        """Runs of frames with at most so many patches, and 16 MiB of pixels, or of one frame."""
        t, h, w = self.grid_thw
        held = MAX_HELD_BYTES // 2 // (3 * prod(self.shape) // t)
        longest = max(min(most_patches // (h * w), held), 1)
        return [self.rows(start, start + longest) for start in range(0, t, longest)]

    def begin(self) -> LazyImage:
        """Decode the first run now, for the first call of `runs`; returns itself."""
        self.begun.append(self.split(self.num_patches)[0].decoded())
        return self

    def runs(self) -> Generator[PreparedImage]:
        """All of it, run by run: while one is looked at, a thread decodes the next.

        Raises ImageError where a run cannot be decoded, after those before it.
        """
        return decoded_ahead(self.in_runs() if self.in_runs is not None else self._in_runs())

    def _in_runs(self) -> Iterator[Prepared]:
        rest = self.split(self.num_patches)[len(self.begun) :]
        while self.begun:
            yield self.begun.pop()  # and let go of it
        yield from rest

    def decoded(self) -> PreparedImage:
        return PreparedImage(self.pixels, self.grid_thw, self.times)


Prepared: TypeAlias = PreparedImage | LazyImage


def decoded_ahead(runs: Iterable[Prepared]) -> Generator[PreparedImage]:
    """Each run decoded, by a thread that is one ahead and asks for them as it comes to them."""
    source = iter(runs)

    def decode_next() -> PreparedImage | None:
        run = next(source, None)
        return None if run is None else run.decoded()

    with ThreadPoolExecutor(1, "vitrt-decode") as thread:
        ahead = thread.submit(decode_next)
        while (run := ahead.result()) is not None:
            ahead = thread.submit(decode_next)
            yield run


def frame_size(frame: Frame) -> tuple[int, int]:
    """(height, width) in pixels."""
    if isinstance(frame, Image.Image):
        return frame.height, frame.width
    height, width = frame.shape[:2]
    return height, width


def resize_frame(frame: Frame, out: np.ndarray, resize: Resize) -> None:
    """Write an RGB frame into `out`, uint8 [H, W, 3], at the size of that."""
    height, width = out.shape[:2]
    if resize == "pillow":
        image = Image.fromarray(frame) if isinstance(frame, np.ndarray) else frame
        copy_pixels(resize_pillow(image, (height, width)), out)
        return
    if isinstance(frame, Image.Image):
        array = np.empty((frame.height, frame.width, 3), dtype=np.uint8)
        copy_pixels(frame, array)
        frame = array
    out[...] = resize_torch(frame, (height, width))
