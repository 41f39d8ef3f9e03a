"""A batch's output, image by image.

Shapes: T patches, D width; a grid is t frames of h x w patches, a merged token m x m of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from vitrt.config import Grid
from vitrt.engine.request import Request
from vitrt.engine.stages import Prepared
from vitrt.features import ImageFeatures
from vitrt.models.tower import TowerOutput


def split_by_image(
    output: TowerOutput, images: Sequence[Prepared], merge: int, request: Request
) -> list[ImageFeatures]:
    """The features of each image, views of what the batch gave; pooled, views of their rows."""
    grids = [image.grid_thw for image in images]
    tokens = [prod(grid) // merge**2 for grid in grids]
    embeddings = output.embeddings.split(tokens if request.merged else [0] * len(grids))
    deepstack: Sequence[Tensor | None] = [None] * len(grids)
    if output.deepstack is not None:
        deepstack = output.deepstack.split(tokens, dim=1)
    hidden: Sequence[Tensor | None] = [None] * len(grids)
    if request.layers:
        hidden = to_raster(output.hidden, grids, merge)
    if request.pool:
        rows = torch.stack([image.mean(0, dtype=torch.float32) for image in embeddings])
        embeddings, deepstack = rows.split(1), [None] * len(grids)
    return [
        ImageFeatures(embedding, levels, image.grid_thw, merge, states, request.layers, image.times)
        for embedding, levels, image, states in zip(
            embeddings, deepstack, images, hidden, strict=True
        )
    ]


def to_raster(hidden: Sequence[Tensor], grids: Sequence[Grid], merge: int) -> list[Tensor]:
    """Hidden states [T, D] of each layer, as one [layers, t, h, w, D] for each image.

    They arrive in the order of `pixel_values`, where the m x m patches of a merged token are
    neighbours.
    """
    images = []
    first = 0
    for t, h, w in grids:
        shape = (t, h // merge, w // merge, merge, merge, -1)
        raster = hidden[0].new_empty(len(hidden), t, h, w, hidden[0].shape[-1])
        for target, layer in zip(raster, hidden, strict=True):
            patches = layer[first : first + t * h * w].view(shape).transpose(2, 3)
            target.view(patches.shape).copy_(patches)
        images.append(raster)
        first += t * h * w
    return images
