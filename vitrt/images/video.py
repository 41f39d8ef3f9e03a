"""Video files: what they hold, and their frames, decoded as they are asked for.

Decoding goes through PyAV, which brings FFmpeg along. Frames are counted in the packets, not in the
header: containers leave the number out, or count frames that an edit list cuts off. Frames are
turned upright by the rotation that the file names. A frame that is neither asked for nor referred
to by another is not decoded: the others come out the same for less work, except for what a decoder
makes up where the file is damaged.

Shapes: F frames, H and W pixels.
"""

from __future__ import annotations

import io
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Generator, Iterator, Sequence, Set
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image

from vitrt.images.cores import CORES
from vitrt.images.inputs import ImageError, PlainInput, content_of, first_bytes
from vitrt.messages import reason_of, shorten

# Pillow was asked first; the name and the first bytes may both mislead.
_UNREAD = "not an image, and cannot be read as a video"
_REFERENCES = 8  # frames that a decoder keeps beside one for each of its threads
_IMAGE_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")


def is_video(content: str | io.BytesIO) -> bool:
    """Whether the first bytes of a file, or of its content, are those of a video container."""
    start = first_bytes(content)
    return (
        (start[4:8] == b"ftyp" and start[8:12] not in _IMAGE_BRANDS)
        or start[4:8] in (b"moov", b"mdat", b"wide", b"free")
        or start[:4] in (b"\x1aE\xdf\xa3", b"OggS", b"\0\0\1\xba", b"\0\0\1\xb3", b"0&\xb2u")
        or (start[:4] == b"RIFF" and start[8:12] == b"AVI ")
        or start[:3] == b"FLV"
        or (start[:1] == b"G" and start[1:2] in (b"@", b"\0", b"A", b"_"))  # a transport stream
    )


def open_video(image: PlainInput, name: str, arrival: int | None = None) -> VideoFile | None:
    """None where it is no video. Raises ImageError where it is one that cannot be read."""
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
        self.rate: float | None  # frames a second, on average
        self.times: tuple[float, ...]  # of each frame, seconds from the first one
        self._threads = 1  # of the open decoder
        self._stamps: list[int]  # of each frame, in the file's unit of time
        self._keys: list[int]  # frames that decoding can start at, the first one always
        with CORES.turn(self._arrival):
            self.rate, self.times = self._scan()
            self.height, self.width = self._first_size()  # upright

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
        with self._lock, _explaining(self.name), CORES.turn(self._arrival):
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
            self._array = _upright(frame)
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
                with _open(self._content) as container:
                    container.seek(stamp, stream=container.streams.video[0])
                    frames = _frames(container, self._threads, wanted)
                    found = next((f for f in frames if f.pts is None or f.pts >= stamp), None)
                    if found is not None and found.pts == stamp:
                        yield found
                        yield from frames
                        return
            with _open(self._content) as container:  # from the first one: always right
                frames = _frames(container, self._threads, wanted)
                yield from frames if wanted else islice(frames, start, None)

    def _close(self) -> None:
        if self._frames is not None:
            self._frames.close()
        self._frames, self._position, self._array = None, -1, None

    def _scan(self) -> tuple[float | None, tuple[float, ...]]:
        """The frame rate and the frames' times, from the packets."""
        with _explaining(self.name, _UNREAD), _open(self._content) as container:
            if not container.streams.video:
                raise ValueError("it has no video stream")
            stream = container.streams.video[0]
            stamps, shown, keys, packets = [], [], [], 0
            for packet in container.demux(stream):
                if packet.size:
                    packets += 1
                    if not packet.is_discard:
                        stamps.append(packet.dts if packet.pts is None else packet.pts)
                        shown.append(packet.pts)
                        keys += [packet.pts] if packet.is_keyframe else []
            if stream.frames > packets:
                raise ValueError(
                    f"truncated: its header counts {stream.frames} frames, it holds {packets}"
                )
            if not stamps:
                raise ValueError("it holds no frame")
            rate = stream.average_rate or stream.guessed_rate or stream.base_rate
            times = _times(stamps, float(stream.time_base or 0), float(rate) if rate else None)
            if not rate and times[-1] > 0:
                rate = (len(times) - 1) / times[-1]
            self._stamps, self._keys = _starts(shown, keys)
        return float(rate) if rate else None, times

    def _first_size(self) -> tuple[int, int]:
        with _explaining(self.name, _UNREAD):
            with _open(self._content) as container:
                frame = next(_frames(container, 1), None)  # more threads give the first one later
            if frame is None:
                raise ValueError("none of its frames can be decoded")
        sides = frame.height, frame.width
        return sides if frame.rotation % 180 == 0 else sides[::-1]


def _times(stamps: list[int | None], unit: float, rate: float | None) -> tuple[float, ...]:
    """Seconds from the first frame to each: by stamps, or by the rate where some have none."""
    known = sorted(stamp for stamp in stamps if stamp is not None)
    if len(known) == len(stamps) and unit:
        return tuple((stamp - known[0]) * unit for stamp in known)
    return tuple(index / (rate or 24.0) for index in range(len(stamps)))


def _starts(stamps: list[int | None], keys: list[int | None]) -> tuple[list[int], list[int]]:
    """Every frame's stamp, and the places of those in `keys`, where no frame is in doubt.

    That is where each has a stamp of its own, and the first one is a key: what a decoder leaves out
    before the first key would be counted here. Else no stamps, and the first frame alone.
    """
    known = sorted(stamp for stamp in stamps if stamp is not None)
    if len(set(known)) < len(stamps) or known[0] not in keys:
        return [], [0]
    places = {stamp: place for place, stamp in enumerate(known)}
    return known, sorted(places[key] for key in keys if key is not None)


def _frames(container: Any, threads: int, wanted: Set[int] | None = None) -> Generator[Any]:
    """The frames of a container's video; where stamps are `wanted`, not all of the others."""
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    decoder = stream.codec_context
    decoder.thread_count = threads
    if wanted is None:
        yield from container.decode(stream)
        return
    for packet in container.demux(stream):
        decoder.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
        yield from packet.decode()


def _upright(frame: Any) -> np.ndarray:
    array = frame.to_ndarray(format="rgb24")
    turns = round(frame.rotation / 90)  # counterclockwise, as numpy turns
    return np.ascontiguousarray(np.rot90(array, turns)) if turns else array


def _open(content: str | io.BytesIO) -> Any:
    try:
        import av
    except ImportError as error:
        raise ValueError("a video is read through PyAV: pip install 'vitrt[video]'") from error
    if isinstance(content, io.BytesIO):
        content = io.BytesIO(content.getbuffer())  # with a position of its own
    return av.open(content, metadata_errors="replace")


@contextmanager
def _explaining(name: str, what: str = "cannot be read as a video") -> Iterator[None]:
    """What FFmpeg, or this file, finds wrong as the one error of an input."""
    try:
        yield
    except ImageError:
        raise
    except Exception as error:  # av.FFmpegError has no base of its own
        raise ImageError(f"{name}: {what}: {shorten(reason_of(error))}") from error
