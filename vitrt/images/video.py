"""The frames of video files, decoded as they are asked for.

A frame that is neither asked for nor referred to by another is not decoded: the others come out the
same for less work, except for what a decoder makes up where the file is damaged.

Shapes: F frames, H and W pixels.
"""

from __future__ import annotations

import io
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Generator, Sequence
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image

from vitrt.images.container import (
    decoded_frames,
    explaining,
    first_size,
    is_video,
    open_container,
    scan,
    upright,
)
from vitrt.images.cores import CORES
from vitrt.images.file_content import content_of
from vitrt.images.inputs import PlainInput

# Pillow was asked first; the name and the first bytes may both mislead.
_UNREAD = "not an image, and cannot be read as a video"
_REFERENCES = 8  # frames that a decoder keeps beside one for each of its threads


def open_video(image: PlainInput, name: str, arrival: int | None = None) -> VideoFile | None:
    """The video in a file; None where it is none. ImageError where it cannot be read."""
    if isinstance(image, Image.Image | np.ndarray):
        return None
    content = content_of(image)
    return VideoFile(content, name, arrival) if is_video(content) else None


class VideoFile:
    """A video, whose frames are best read in order; threads may share it."""

    def __init__(self, content: str | io.BytesIO, name: str, arrival: int | None = None) -> None:
        """`content` is a path, or what such a file holds; `name` is for messages.

        Videos are decoded in the order of their `arrival`, a number from CORES; None: a new one.

        Raises:
            ImageError: PyAV is missing, there is no video in it, or it is broken.
        """
        self.name = name
        self._content = content
        self._arrival = CORES.arrive() if arrival is None else arrival
        self._lock = threading.Lock()
        self._frames: Generator[Any] | None = None  # of the decoder
        self._position = -1  # of the frame that it gave last
        self._array: np.ndarray | None = None  # that frame, converted
        self._skips = True  # leave out unwanted frames, until a wanted one fails to come out
        self.wanted: Sequence[int] = ()  # all that is ever read, ascending; none: not known
        self._threads = 1  # of the open decoder
        with CORES.turn(self._arrival), explaining(name, _UNREAD):
            found = scan(content)
            self.height, self.width = first_size(content)  # upright
        self.rate, self.times = found.rate, found.times
        self._stamps, self._keys = found.stamps, found.keys

    @property
    def nbytes(self) -> int:
        """About how much memory the frames of an open decoder take."""
        if self._frames is None:
            return 0
        frames = self._threads + _REFERENCES
        return frames * self.height * self.width * 3 // 2

    def read(self, indices: Sequence[int], take: Callable[[int, np.ndarray], None]) -> None:
        """Give `take` the place in `indices` and the frame, uint8 [H, W, 3], of each of them.

        They ascend, and may repeat. Goes on where the last call ended, or from the start of the
        file for what lies before that. Raises ImageError where a frame cannot be had.
        """
        with self._lock, explaining(self.name), CORES.turn(self._arrival):
            for place, index in enumerate(indices):
                take(place, self._frame(index))
            if self.wanted and indices[-1] == self.wanted[-1]:
                self._close()

    def _frame(self, index: int) -> np.ndarray:
        if self._frames is None or index < self._position:
            self._close()
            start = self._keys[bisect_right(self._keys, index) - 1]
            self._frames, self._position = self._decode(start), start - 1
        frame = None
        while self._position < index:
            frame = next(self._frames, None)
            self._position = self._place(frame)
        if self._position > index and self._skipping:
            self._skips = False  # the file is not what its packets say: decode all, and count
            self._close()
            return self._frame(index)
        if self._position > index:
            self._close()
            raise ValueError(f"it ends before frame {index} of {len(self.times)}")
        if frame is not None:
            self._array = upright(frame)
            if self._array.shape[:2] != (self.height, self.width):
                raise ValueError(
                    f"frame {index} has {self._array.shape[0]} x {self._array.shape[1]} pixels, "
                    f"the first one {self.height} x {self.width}"
                )
        assert self._array is not None
        return self._array

    def _place(self, frame: Any) -> int:
        """The place of the next frame; one past the last where there is none, or none known."""
        if frame is None:
            return len(self.times)
        if not self._skipping:
            return self._position + 1
        place = bisect_left(self._stamps, frame.pts) if frame.pts is not None else len(self._stamps)
        known = place < len(self._stamps) and self._stamps[place] == frame.pts
        return place if known else len(self.times)

    @property
    def _skipping(self) -> bool:
        """Whether frames are left out, and the others known by their stamps."""
        return self._skips and bool(self.wanted and self._stamps)

    def _decode(self, start: int = 0) -> Generator[Any]:
        """The frames from `start` on, which is in `_keys`, less some that nobody wants."""
        wanted = None
        if self._skipping:
            wanted = {self._stamps[index] for index in (start, *self.wanted)}
        with CORES.share() as self._threads:
            if start:
                stamp = self._stamps[start]
                with open_container(self._content) as container:
                    container.seek(stamp, stream=container.streams.video[0])
                    frames = decoded_frames(container, self._threads, wanted)
                    found = next((f for f in frames if f.pts is None or f.pts >= stamp), None)
                    if found is not None and found.pts == stamp:
                        yield found
                        yield from frames
                        return
            with open_container(self._content) as container:  # from the first one: always right
                frames = decoded_frames(container, self._threads, wanted)
                yield from frames if wanted else islice(frames, start, None)

    def _close(self) -> None:
        if self._frames is not None:
            self._frames.close()
        self._frames, self._position, self._array = None, -1, None
