"""The pixels of a PIL image as an array, copied without the GIL.

`np.asarray(image)` converts and copies them while it holds the GIL, 0.2 ms for 448 x 448 pixels:
where the GIL decides, half of what 16 threads could decode. Pillow also exports its own memory,
through Arrow's C data interface, and what numpy copies out of that it copies beside other threads.
"""

from __future__ import annotations

import nanoarrow
import numpy as np
from PIL import Image

_STORED = 4  # bytes of an RGB pixel in Pillow's memory, the last of them unused


def copy_pixels(image: Image.Image, out: np.ndarray) -> None:
    """Write an RGB image of H x W pixels into `out`, uint8 [H, W, 3]."""
    try:
        stored = nanoarrow.c_array(image).view().child(0).buffer(1)
    except ValueError:  # Pillow keeps large images, by default of over 16 MiB, in several pieces
        out[...] = np.asarray(image)
        return
    pixels = np.frombuffer(stored, dtype=np.uint8).reshape(*out.shape[:2], _STORED)
    for channel in range(3):  # faster than all at once
        out[..., channel] = pixels[..., channel]
