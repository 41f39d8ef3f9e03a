"""What comes out of an encoder: one object per image, or one for a whole batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ImageFeatures:
    """Features of one image or clip."""

    # [tokens, out_hidden], raster order inside each frame; with merged=False [0, out_hidden].
    embeddings: Tensor
    deepstack: Tensor | None  # [levels, tokens, out_hidden]; None where there is none
    grid_thw: tuple[int, int, int]  # patches: frames (after temporal merging), rows, columns
    merge_size: int = 2  # patches a side of one merged token
    # [layers, t, h, w, hidden_size]: after each of `layers`, patches in raster order; on request.
    hidden: Tensor | None = None
    layers: tuple[int, ...] = ()  # that `hidden` holds, in its order, from 0

    @property
    def merged(self) -> bool:
        """Whether there are merged tokens: `embeddings`, and `deepstack` where the model has it."""
        return self.embeddings.shape[0] > 0

    def spatial(self) -> Tensor:
        """The embeddings as a view [t, h / merge, w / merge, out_hidden]."""
        t, h, w = self.grid_thw
        return self._tokens().view(t, h // self.merge_size, w // self.merge_size, -1)

    def concatenated(self) -> Tensor:
        """[tokens, out_hidden * (1 + levels)], embeddings first, as vLLM and SGLang take them."""
        if self.deepstack is None:
            return self._tokens()
        return torch.cat([self.embeddings, *self.deepstack.unbind(0)], dim=-1)

    def pooled(self) -> Tensor:
        """[out_hidden] float32: the mean of the embeddings over the tokens."""
        return self._tokens().mean(dim=0, dtype=torch.float32)

    def _tokens(self) -> Tensor:
        if not self.merged:
            raise ValueError(
                "these features have no merged tokens: they were encoded with merged=False, for "
                "their hidden states alone"
            )
        return self.embeddings


@dataclass(frozen=True, slots=True)
class EncoderOutput:
    """Features of a whole batch, in the order of its `pixel_values`."""

    embeddings: Tensor  # [tokens, out_hidden]
    deepstack: Tensor | None  # [levels, tokens, out_hidden]
    grid_thw: Tensor  # int64 [images, 3]
    hidden: Tensor | None = None  # [patches, hidden_size] before the merger, only on request
