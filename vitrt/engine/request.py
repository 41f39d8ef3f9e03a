"""Dense features: hidden states of chosen layers, every patch at its place in the image.

Shapes: T patches, D width; a grid is t frames of h x w patches, a merged token m x m of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import index
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from vitrt.engine.device import values_per_patch
from vitrt.features import ImageFeatures
from vitrt.images.processor import PreparedImage

if TYPE_CHECKING:
    from vitrt.encoder import VisionEncoder
    from vitrt.engine.eager_runner import RunnerStats

AnyEncoder: TypeAlias = "VisionEncoder | DenseEncoder"


def check_layers(layers: Iterable[int], depth: int, *, merged: bool = True) -> tuple[int, ...]:
    """`layers` counted from 0, in their order; negative ones count from the last, -1.

    ValueError names an index that a tower of `depth` layers does not have or that comes twice, and
    a request that asks for nothing: no layers and not `merged`.
    """
    found: list[int] = []
    for layer in layers:
        try:
            place = index(layer)
        except TypeError:
            raise ValueError(f"layers holds {layer!r}; it must hold integers only") from None
        if not -depth <= place < depth:
            raise ValueError(
                f"layers holds {place}; the tower has {depth} layers: 0 to {depth - 1}, or "
                f"{-depth} to -1 from the last"
            )
        if place % depth in found:
            raise ValueError(
                f"layers holds layer {place % depth} twice, the second time as {place}"
            )
        found.append(place % depth)
    if not found and not merged:
        raise ValueError(
            "merged=False without layers asks for nothing; name the layers whose hidden states "
            "are wanted, as in layers=[-1]"
        )
    return tuple(found)


def to_raster(
    hidden: Sequence[Tensor], grids: Sequence[tuple[int, int, int]], merge: int
) -> list[Tensor]:
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


class DenseEncoder:
    """A VisionEncoder that gives hidden states with each of its features: a view, not a copy."""

    def __init__(self, encoder: VisionEncoder, layers: Iterable[int], *, merged: bool) -> None:
        """ValueError as in `check_layers`."""
        config = encoder.config
        self.layers = check_layers(layers, config.depth, merged=merged)
        self.merged = merged
        self.device: torch.device = encoder.device
        self.processor = encoder.processor
        self.parallel = encoder.parallel
        self.max_batch_tokens: int = encoder.max_batch_tokens
        if encoder.runtime.max_batch_tokens is None:
            # That was chosen for a forward that keeps no hidden states.
            share = values_per_patch(config) / values_per_patch(config, len(self.layers))
            self.max_batch_tokens = max(int(self.max_batch_tokens * share), 1)
        self._encoder = encoder

    def encode_prepared(self, images: Sequence[PreparedImage]) -> list[ImageFeatures]:
        return self._encoder.encode_prepared(images, layers=self.layers, merged=self.merged)

    def stats(self) -> RunnerStats:
        return self._encoder.stats()
