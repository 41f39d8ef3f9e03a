"""Small videos, written by PyAV."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from vitrt.images import prepared, processor


def hold_at_most(nbytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Videos with more pixels are decoded in runs of half as many."""
    monkeypatch.setattr(prepared, "MAX_HELD_BYTES", nbytes)
    monkeypatch.setattr(processor, "MAX_HELD_BYTES", nbytes)
    monkeypatch.setattr(processor, "MAX_WHOLE_BYTES", nbytes)


def write_video(
    path: Path,
    frames: int = 10,
    size: tuple[int, int] = (64, 96),
    *,
    rate: int | Fraction = 25,
    codec: str = "mpeg4",
    rotation: int = 0,
    gop: int | None = None,
    stamps: list[int] | None = None,
    seed: int = 0,
) -> Path:
    """A video of a changing picture.

    `gop`: frames from one key frame to the next; `stamps`: the frames' times in milliseconds.
    """
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 200, (size[0] // 8 + 1, size[1] // 8 + 1, 3), dtype=np.uint8)
    base = base.repeat(8, 0).repeat(8, 1)[: size[0], : size[1]]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        if codec == "gif":
            stream.pix_fmt = "rgb8"
        if gop is not None:
            stream.gop_size = gop
        if rotation:
            stream.set_display_rotation(rotation)
        if stamps is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for index in range(frames):
            picture = np.roll(base, 3 * index, axis=1) + np.uint8(index % 50)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            if stamps is not None:
                frame.pts, frame.time_base = stamps[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def read_all(path: Path) -> np.ndarray:
    """Every frame as PyAV decodes it, uint8 [F, H, W, 3], not turned."""
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
