"""Images to measure with: the user's, or photo-like ones that are the same on every machine."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import islice

import numpy as np
from PIL import Image

from vitrt.images.decode import decode
from vitrt.messages import counted
from vitrt.sources.folder import is_video_name
from vitrt.sources.inputs import Inputs
from vitrt.sources.record import Record

logger = logging.getLogger(__name__)

MOST_IMAGES = 16  # of the user's, by default
# (height, width): common ones, a strip, an upright one, an icon that has to be enlarged.
SIZES = ((420, 560), (333, 500), (97, 640), (512, 300), (60, 45))


def choose_images(inputs: Sequence[str], most: int | None = None) -> list[str | Image.Image]:
    """The first `most` images of the inputs (None: MOST_IMAGES), or without inputs made-up ones.

    Videos among them are passed over.

    ValueError for inputs that hold no image.
    """
    if not inputs:
        return list(sample_images())
    most = MOST_IMAGES if most is None else most
    if most < 1:
        raise ValueError(f"most images must be at least 1, got {most}")
    # transformers reads videos through what need not be installed here.
    images = (record for record in Inputs(inputs) if not is_video_name(record.id))
    sources = list(islice(images, most + 1))
    if not sources:
        raise ValueError(f"no image in {', '.join(inputs)}")
    if len(sources) > most:
        logger.info("taking the first %s", counted(most, "image"))
    return [_loaded(source) for source in sources[:most]]


def _loaded(record: Record) -> str | Image.Image:
    """A file's path, or the image from inside another file."""
    content = record.load()
    return decode(content, record.id) if isinstance(content, bytes) else content


def sample_images() -> list[Image.Image]:
    """One picture of each of `SIZES`."""
    return [sample_image(height, width, seed) for seed, (height, width) in enumerate(SIZES)]


def sample_image(height: int, width: int, seed: int = 0) -> Image.Image:
    """Coloured noise with the spectrum of photographs, under a few discs and bars."""
    rng = np.random.default_rng(seed)
    canvas = np.zeros((height, width, 3), np.float32)
    cells = 2
    while cells < max(height, width):
        noise = rng.standard_normal((cells, cells, 3)).astype(np.float32) / cells
        canvas += np.stack([_enlarged(noise[..., c], height, width) for c in range(3)], axis=-1)
        cells *= 2
    canvas = 128 + 56 * canvas / canvas.std()
    rows, columns = np.mgrid[:height, :width]
    for _ in range(6):
        top, left = rng.random(2) * (height, width)
        size = rng.uniform(0.05, 0.3) * min(height, width)
        inside = np.hypot(rows - top, columns - left) < size
        if rng.random() < 0.5:
            inside = (abs(rows - top) < size) & (abs(columns - left) < size / 3)
        canvas[inside] = 0.3 * canvas[inside] + 0.7 * rng.uniform(0, 255, 3)
    return Image.fromarray(canvas.clip(0, 255).astype(np.uint8))


def _enlarged(noise: np.ndarray, height: int, width: int) -> np.ndarray:
    resized = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized)
