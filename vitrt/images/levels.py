"""What becomes of pixels' levels: the tables that normalise them, and whole patches of them.

Shapes: T patches, P = 3 * temporal_patch_size * patch_size ** 2 values of one patch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vitrt.images.config import PreprocessorConfig
from vitrt.images.prepared import Prepared
from vitrt.images.resize import RESIZE_NAMES, Resize


def level_tables(preprocessor: PreprocessorConfig, resize: Resize) -> np.ndarray:
    """float32 [2, 3, 256]: the normalised levels of images, and of the frames of clips."""
    images = clips = normalisation_table(preprocessor.image_mean, preprocessor.image_std, resize)
    if video := preprocessor.video:
        clips = normalisation_table(video.image_mean, video.image_std, "torch")
    return np.stack([images, clips])


def normalisation_table(mean: Sequence[float], std: Sequence[float], resize: Resize) -> np.ndarray:
    """Every channel's uint8 levels, rescaled by 1 / 255 and normalised: float32 [3, 256].

    Bit-equal to the transformers backend that `resize` names.

    Raises:
        ValueError: not three means and three non-zero deviations, or an unknown `resize`.
    """
    if len(mean) != 3 or len(std) != 3 or 0 in std:
        raise ValueError(f"mean {mean} and std {std} must be three values each, std without zeros")
    if resize not in RESIZE_NAMES:
        raise ValueError(f"resize is {resize!r}; it must be one of {RESIZE_NAMES}")
    levels = np.arange(256)
    means = np.asarray(mean, dtype=np.float32)[:, None]
    stds = np.asarray(std, dtype=np.float32)[:, None]
    if resize == "pillow":
        return ((levels * (1 / 255)).astype(np.float32) - means) / stds
    scale = np.float32(255)  # the torchvision backend folds the rescaling into mean and std
    return (levels.astype(np.float32) - means * scale) / (stds * scale)


def patches_reference(
    prepared: Prepared,
    table: np.ndarray,
    patch_size: int,
    temporal_patch_size: int,
    merge_size: int,
) -> np.ndarray:
    """float32 [T, P]: transformers' `pixel_values` of one prepared image or clip.

    Patches are ordered t, h / merge, w / merge, merge row, merge column; the values of a patch by
    channel, frame, row, column. An image counts as its frame repeated `temporal_patch_size` times.
    `table` is one for all, [3, 256], or that of images and that of clips, [2, 3, 256].
    """
    if table.ndim == 3:
        table = table[int(prepared.shape[0] > 1)]
    grid_t, grid_h, grid_w = prepared.grid_thw
    pixels = np.moveaxis(prepared.pixels, -1, 1)  # [F, 3, H, W]
    values = table[np.arange(3)[None, :, None, None], pixels]
    values = np.broadcast_to(values, (grid_t * temporal_patch_size, *values.shape[1:]))
    values = values.reshape(
        grid_t,
        temporal_patch_size,
        3,
        grid_h // merge_size,
        merge_size,
        patch_size,
        grid_w // merge_size,
        merge_size,
        patch_size,
    )
    return values.transpose(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(grid_t * grid_h * grid_w, -1)
