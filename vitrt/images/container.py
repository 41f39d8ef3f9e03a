"""A video file's container, through PyAV, which brings FFmpeg along: what it holds, and its frames.

Frames are counted in the packets, not in the header: containers leave the number out, or count
frames that an edit list cuts off. They are turned upright by the rotation that the file names.

Shapes: H and W pixels.
"""

from __future__ import annotations

import io
from collections.abc import Generator, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from vitrt.images.file_content import first_bytes
from vitrt.images.heif import BRANDS
from vitrt.images.inputs import ImageError
from vitrt.messages import reason_of, shorten

_IMAGE_BRANDS = (b"avif", b"avis", *BRANDS)


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


@dataclass(frozen=True, slots=True)
class Scan:
    """What the packets of a video say of its frames."""

    rate: float | None  # frames a second, on average
    times: tuple[float, ...]  # of each frame, seconds from the first one
    stamps: list[int]  # of each frame, in the file's unit of time; none where they are in doubt
    keys: list[int]  # frames that decoding can start at, the first one always


def scan(content: str | io.BytesIO) -> Scan:
    """Read the packets of a file. ValueError where it holds no video, or not all of it."""
    with open_container(content) as container:
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
    return Scan(float(rate) if rate else None, times, *_starts(shown, keys))


def first_size(content: str | io.BytesIO) -> tuple[int, int]:
    """(H, W) of the first frame, upright. ValueError where none can be decoded."""
    with open_container(content) as container:
        frame = next(decoded_frames(container, 1), None)  # more threads give the first one later
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


def decoded_frames(container: Any, threads: int, wanted: Set[int] | None = None) -> Generator[Any]:
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


def upright(frame: Any) -> np.ndarray:
    """A decoded frame as uint8 [H, W, 3], turned as the file says."""
    array = frame.to_ndarray(format="rgb24")
    turns = round(frame.rotation / 90)  # counterclockwise, as numpy turns
    return np.ascontiguousarray(np.rot90(array, turns)) if turns else array


def open_container(content: str | io.BytesIO) -> Any:
    """A file, or its content, opened by PyAV. ValueError where that is missing."""
    try:
        import av
    except ImportError as error:
        raise ValueError("a video is read through PyAV: pip install 'vitrt[video]'") from error
    if isinstance(content, io.BytesIO):
        content = io.BytesIO(content.getbuffer())  # with a position of its own
    return av.open(content, metadata_errors="replace")


@contextmanager
def explaining(name: str, what: str = "cannot be read as a video") -> Iterator[None]:
    """Turn whatever FFmpeg, or this file, raises inside the block into an ImageError."""
    try:
        yield
    except ImageError:
        raise
    except Exception as error:  # av.FFmpegError has no base of its own
        raise ImageError(f"{name}: {what}: {shorten(reason_of(error))}") from error
