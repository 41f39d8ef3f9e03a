"""Patch embedding: a convolution whose stride is its kernel, so one product over flat patches.

Shapes: T patches, P = channels * temporal * patch * patch values of one patch, D width.
"""

from __future__ import annotations

from collections.abc import Iterator

from vitrt.config import VisionConfig
from vitrt.layers.linear import Linear
from vitrt.layers.weights import WeightTarget, whole


class PatchEmbed(Linear):
    """[T, P] -> [T, D], by a weight [D, P] that the checkpoint holds in the shape of a Conv3d's."""

    def __init__(self, config: VisionConfig, *, bias: bool) -> None:
        super().__init__(config.patch_dim, config.hidden_size, bias=bias)
        self.conv_shape = (
            config.hidden_size,
            config.in_channels,
            config.temporal_patch_size,
            config.patch_size,
            config.patch_size,
        )

    def weight_targets(self, prefix: str) -> Iterator[WeightTarget]:
        yield whole(f"{prefix}proj.weight", self.weight, self.conv_shape)
        if self.bias is not None:
            yield whole(f"{prefix}proj.bias", self.bias)
