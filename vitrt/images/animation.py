"""The frames of an animated GIF, WebP, PNG or AVIF, each as it is seen, and their times."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import numpy as np
from PIL import Image

from vitrt.images.decode import decode, open_image, reading
from vitrt.images.inputs import PlainInput
from vitrt.images.prepared import Frames

_FORMATS = ("GIF", "WEBP", "PNG", "AVIF")  # a TIFF or MPO of several pages is no animation
_UNKNOWN_DURATION = 100  # milliseconds, as browsers show what does not say


def count_frames(image: PlainInput) -> int:
    """Frames of an animation, 1 for other images. Raises what `decode` explains."""
    with _opened(image) as opened:
        return _frames(opened)


def frames_of(image: PlainInput, name: str) -> Frames:
    """Every frame upright and in RGB. Raises ImageError where one is broken."""
    frames: list[Image.Image] = []
    times: list[float] = []
    with reading(name), _opened(image) as opened:
        elapsed = 0.0
        for index in range(_frames(opened)):
            opened.seek(index)
            opened.load()
            frames.append(decode(opened.copy(), name))
            times.append(elapsed / 1000)
            elapsed += float(opened.info.get("duration") or _UNKNOWN_DURATION)
    return Frames(frames, tuple(times))


def _opened(image: PlainInput) -> AbstractContextManager[Image.Image]:
    assert not isinstance(image, np.ndarray)
    return nullcontext(image) if isinstance(image, Image.Image) else open_image(image)


def _frames(opened: Image.Image) -> int:
    return int(getattr(opened, "n_frames", 1)) if opened.format in _FORMATS else 1
