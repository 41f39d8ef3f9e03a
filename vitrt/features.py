"""What comes out of an encoder: one object per image, or one for a whole batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from vitrt.messages import counted, shorten


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class ImageFeatures:
    """Features of one image or clip.

    Its tensors may be views of those of a whole batch, which then stay in memory as long as any of
    them. `clone()` leaves the batch behind, as pickling does; `torch.save` of a tensor alone, which
    writes the whole batch, does not.
    """

    # [tokens, out_hidden], raster order inside each frame; with merged=False [0, out_hidden].
    embeddings: Tensor
    deepstack: Tensor | None  # [levels, tokens, out_hidden]; None where there is none
    grid_thw: tuple[int, int, int]  # patches: frames (after temporal merging), rows, columns
    merge_size: int = 2  # patches a side of one merged token
    # [layers, t, h, w, hidden_size]: after each of `layers`, patches in raster order; on request.
    hidden: Tensor | None = None
    layers: tuple[int, ...] = ()  # that `hidden` holds, in its order, from 0
    # Seconds of the grid's frames in their video, each the middle of those merged into it.
    times: tuple[float, ...] | None = None

    def __repr__(self) -> str:
        return _described(self)

    @property
    def merged(self) -> bool:
        """Whether there are merged tokens: `embeddings`, and `deepstack` where the model has it."""
        return self.embeddings.shape[0] > 0

    def spatial(self) -> Tensor:
        """The embeddings as a view [t, h / merge, w / merge, out_hidden]."""
        t, h, w = self.grid_thw
        return self._each_token().view(t, h // self.merge_size, w // self.merge_size, -1)

    def concatenated(self) -> Tensor:
        """[tokens, out_hidden * (1 + levels)], embeddings first, as vLLM and SGLang take them."""
        tokens = self._each_token()
        if self.deepstack is None:
            return tokens
        return torch.cat([tokens, *self.deepstack.unbind(0)], dim=-1)

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

    def _each_token(self) -> Tensor:
        tokens, whole = self._tokens(), prod(self.grid_thw) // self.merge_size**2
        if len(tokens) != whole:
            raise ValueError(
                f"these features have {counted(len(tokens), 'row')} for the {whole} merged tokens "
                f"of grid {self.grid_thw}: they were pooled, and hold no single token any more"
            )
        return tokens

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by the names of their fields."""
        named = {"embeddings": self.embeddings, "deepstack": self.deepstack, "hidden": self.hidden}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def mapped(self, change: Callable[[Tensor], Tensor]) -> ImageFeatures:
        """These features with each tensor replaced by `change` of it."""
        changed: dict[str, Any] = {name: change(t) for name, t in self.tensors().items()}
        return replace(self, **changed)

    def clone(self) -> ImageFeatures:
        """The same features in memory of their own: to keep or save some images of a batch."""
        return self.mapped(_copied)

    def __reduce__(self) -> tuple[Any, ...]:
        alone = self.mapped(_alone)
        return ImageFeatures, tuple(getattr(alone, field.name) for field in fields(alone))


def _described(features: ImageFeatures | EncoderOutput) -> str:
    """Shapes, where a dataclass by itself would show pages of numbers."""
    values = ((field.name, getattr(features, field.name)) for field in fields(features))
    shown = [
        f"{name}={_shape(value) if isinstance(value, Tensor) else shorten(str(value))}"
        for name, value in values
        if value is not None and value != ()
    ]
    return f"{type(features).__name__}({', '.join(shown)})"


def _shape(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _copied(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def _alone(tensor: Tensor) -> Tensor:
    """The tensor, copied where it is a view of a larger one."""
    return _copied(tensor) if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def join(parts: Sequence[ImageFeatures]) -> ImageFeatures:
    """A clip from its runs of frames, in their order; one that was not cut as it is."""
    first = parts[0]
    if len(parts) == 1:
        return first

    def along(dim: int, tensors: Sequence[Tensor | None]) -> Tensor | None:
        present = [tensor for tensor in tensors if tensor is not None]
        return torch.cat(present, dim) if present else None

    return ImageFeatures(
        torch.cat([part.embeddings for part in parts]),
        along(1, [part.deepstack for part in parts]),
        (sum(part.grid_thw[0] for part in parts), *first.grid_thw[1:]),
        first.merge_size,
        along(1, [part.hidden for part in parts]),
        first.layers,
        _join_times(parts),
    )


def join_pooled(parts: Sequence[ImageFeatures]) -> ImageFeatures:
    """A clip's mean over its tokens from those of its runs of frames."""
    frames = [part.grid_thw[0] for part in parts]
    rows = torch.stack([n * part.embeddings for n, part in zip(frames, parts, strict=True)])
    first = parts[0]
    grid = (sum(frames), *first.grid_thw[1:])
    return ImageFeatures(
        rows.sum(0) / sum(frames), None, grid, first.merge_size, times=_join_times(parts)
    )


def _join_times(parts: Sequence[ImageFeatures]) -> tuple[float, ...] | None:
    return sum((part.times or () for part in parts), ()) or None


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class EncoderOutput:
    """Features of a whole batch, in the order of its `pixel_values`."""

    embeddings: Tensor  # [tokens, out_hidden]
    deepstack: Tensor | None  # [levels, tokens, out_hidden]
    grid_thw: Tensor  # int64 [images, 3]
    hidden: Tensor | None = None  # [patches, hidden_size] before the merger, only on request

    def __repr__(self) -> str:
        return _described(self)
