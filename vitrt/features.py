"""What comes out of an encoder: one object per image, or one for a whole batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ImageFeatures:
    """Features of one image or clip."""

    embeddings: Tensor  # [tokens, out_hidden], raster order inside each frame
    deepstack: Tensor | None  # [levels, tokens, out_hidden], or None where the model has none
    grid_thw: tuple[int, int, int]  # patches: frames (after temporal merging), rows, columns
    merge_size: int = 2  # patches a side of one merged token

    def spatial(self) -> Tensor:
        """The embeddings as a view [t, h / merge, w / merge, out_hidden]."""
        t, h, w = self.grid_thw
        return self.embeddings.view(t, h // self.merge_size, w // self.merge_size, -1)

    def concatenated(self) -> Tensor:
        """[tokens, out_hidden * (1 + levels)], the embeddings first: the layout vLLM and SGLang
        take.
        """
        if self.deepstack is None:
            return self.embeddings
        return torch.cat([self.embeddings, *self.deepstack.unbind(0)], dim=-1)

    def pooled(self) -> Tensor:
        """[out_hidden] float32: the mean of the embeddings over the tokens."""
        return self.embeddings.float().mean(dim=0)


@dataclass(frozen=True, slots=True)
class EncoderOutput:
    """Features of a whole batch, in the order of its `pixel_values`."""

    embeddings: Tensor  # [tokens, out_hidden]
    deepstack: Tensor | None  # [levels, tokens, out_hidden]
    grid_thw: Tensor  # int64 [images, 3]
    hidden: Tensor | None = None  # [patches, hidden_size] before the merger, only on request
