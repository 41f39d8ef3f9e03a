"""What an encoder is given, refused by name where it would be taken for something else."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import cast

import numpy as np
from PIL import Image
from torch import Tensor

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


def check_pixel_values(pixel_values: Tensor, patches: int, patch_dim: int) -> None:
    """ValueError unless it is a floating-point tensor [patches, patch_dim]."""
    if not isinstance(pixel_values, Tensor):
        raise ValueError(f"pixel_values is a {type(pixel_values).__name__}; it must be a tensor")
    if tuple(pixel_values.shape) != (patches, patch_dim):
        raise ValueError(
            f"pixel_values has shape {tuple(pixel_values.shape)}; grid_thw holds {patches} patches "
            f"of {patch_dim} values in this model, so it must be ({patches}, {patch_dim})"
        )
    if not pixel_values.is_floating_point():
        raise ValueError(
            f"pixel_values is {pixel_values.dtype}; it must be a floating-point tensor"
        )
