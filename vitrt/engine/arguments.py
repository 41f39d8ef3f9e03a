"""What an encoder is given, refused by name where it would be taken for something else."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import cast

import numpy as np
from PIL import Image

from vitrt.images.decode import ImageInput, describe


def check_several(images: Iterable[ImageInput]) -> None:
    """ValueError for what is one image: its characters, bytes or rows would be taken for images."""
    one = isinstance(images, (str, bytes, os.PathLike, Image.Image))
    if isinstance(images, np.ndarray):  # of numbers, or of paths
        one = images.ndim < 4 and images.dtype.kind not in "OU"
    if one:
        raise ValueError(
            f"images is one image, {describe(cast(ImageInput, images))}; give a list: [image]"
        )
