"""Images to measure with where the user gives none: photo-like, and the same on every machine."""

from __future__ import annotations

import numpy as np
from PIL import Image

# (height, width): common ones, a strip, an upright one, an icon that has to be enlarged.
SIZES = ((420, 560), (333, 500), (97, 640), (512, 300), (60, 45))


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
